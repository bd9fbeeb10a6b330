"""The reserve of the index's disk; on a small file system of its own where one may be mounted."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from vecfleet.common.collection import CollectionSpec
from vecfleet.common.errors import Unavailable
from vecfleet.worker.catalog import Catalog
from vecfleet.worker.disk_reserve import FILE_NAME, DiskReserve

RESERVE, SLICE = 2 << 20, 256 << 10
SPEC = CollectionSpec(model="m", space="0" * 16, dimension=8)


class Usage(NamedTuple):
    """As ``shutil.disk_usage`` tells it."""

    free: int


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How much of the disk is said to be free."""
    bytes_free = [1 << 30]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(bytes_free[0]))
    yield bytes_free


def refuse() -> None:
    raise Unavailable("No space left on device")


def test_each_need_takes_a_slice_until_there_is_none(tmp_path: Path, free: list[int]) -> None:
    reserve, file = DiskReserve(tmp_path), tmp_path / FILE_NAME
    reserve.fill()
    assert file.stat().st_size == RESERVE
    free[0] = 100
    for left in range(RESERVE - SLICE, -1, -SLICE):

        def once(left: int = left) -> str:
            return "done" if file.stat().st_size == left else str(refuse())

        assert reserve.in_need(once) == "done"
    with pytest.raises(Unavailable):
        reserve.in_need(refuse)
    reserve.fill()
    assert file.stat().st_size == 0, "others need what is left"
    free[0] = 4 * RESERVE
    reserve.fill()
    assert file.stat().st_size == RESERVE


def test_what_fails_for_another_reason_costs_nothing(tmp_path: Path, free: list[int]) -> None:
    reserve = DiskReserve(tmp_path)
    reserve.fill()
    with pytest.raises(Unavailable):
        reserve.in_need(refuse)
    assert (tmp_path / FILE_NAME).stat().st_size == RESERVE


def test_only_who_writes_keeps_a_reserve(tmp_path: Path) -> None:
    Catalog.open(tmp_path).close()
    assert not (tmp_path / FILE_NAME).exists()
    Catalog.open(tmp_path, token=1).close()
    assert (tmp_path / FILE_NAME).stat().st_size == RESERVE


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={32 << 20}", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill_up(file: Path) -> None:
    """Write into ``file`` until not a byte more fits."""
    with file.open("ab", buffering=0) as handle:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while handle.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


@pytest.mark.parametrize("starts", [0, 1, 3])
def test_a_collection_can_be_deleted_on_a_full_disk(small_disk: Path, starts: int) -> None:
    """However often the aggregator was started since, and whatever others took meanwhile."""
    catalog = Catalog.open(small_disk, token=1)
    made = catalog.create("books", SPEC)
    folder = catalog.directory(made)
    folder.mkdir(parents=True)
    fill_up(folder / "segment")
    with pytest.raises(Unavailable):
        catalog.create("more", SPEC)
    for token in range(2, 2 + starts):
        catalog.close()  # which takes SQLite's log away, whose room others take
        fill_up(folder / "segment")
        catalog = Catalog.open(small_disk, token=token)
        fill_up(folder / "segment")
    catalog.delete("books")
    catalog.remove_deleted()
    assert not folder.exists()
    assert catalog.create("more", SPEC).name == "more"
    assert (small_disk / FILE_NAME).stat().st_size == RESERVE
    catalog.close()
