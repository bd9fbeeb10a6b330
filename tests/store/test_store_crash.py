"""Kill the writer at every step and at any moment; nothing acknowledged is lost or doubled.

SIGKILL leaves the page cache alone, so these tests show the order of writes, not that fsync works.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from index_oracle import SPEC, Oracle, check_reader, open_writer, settle, shard

from vecfleet.worker.digest import shard_key
from vecfleet.worker.manifest import Manifest
from vecfleet.worker.partition_reader import PartitionReader
from vecfleet.worker.partition_state import Change

RUN = Path(__file__).with_name("crash_run.py")
sys.path.insert(0, str(RUN.parent))
from crash_run import SHARDS, acknowledged, make_plan  # noqa: E402

PLAN = make_plan()
WRITER_POINTS = ["written", "synced", "renamed", "before commit", "committed", "swapped"]
CHILD_POINTS = [
    *(f"merge {step}" for step in ("opened", "written", "synced", "renamed")),
    "merged",
    "index opened",
    "index built",
    "renamed",
    "index measured",
]


def start(directory: Path, seed: int, point: str = "", occurrence: int = 0, child: str = ""):
    command = [sys.executable, str(RUN), str(directory), str(seed), point, str(occurrence), child]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def check(directory: Path) -> int:
    """What the manifest says was applied is there, and all that was acknowledged was applied.

    Works on a copy, so that looking repairs nothing.
    """
    copy = directory.with_name(f"{directory.name}-copy")
    shutil.rmtree(copy, ignore_errors=True)
    if not (directory / "manifest.db").exists():
        assert not acknowledged(directory)
        return 0
    shutil.copytree(directory, copy)
    manifest = Manifest.open(copy, SPEC, 10**9)
    keys = {shard_key(one[0]): one for one in PLAN}
    applied = [keys[key] for key in manifest.applied(list(keys))]
    manifest.close()
    assert acknowledged(directory) <= {one[0] for one in applied}
    oracle = Oracle()
    for one in applied:
        oracle.apply(*one)
    reader = PartitionReader.open(copy)
    assert reader.stats().quarantined == ()
    check_reader(reader, oracle)
    reader.close()
    return len(applied)


def finish(directory: Path, token: int) -> None:
    """The last life: everything is applied, and only files that count are left."""
    process = start(directory, token)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert check(directory) == SHARDS
    writer = open_writer(directory, 10**9)
    assert settle(writer) == []
    names = {path.name for path in directory.iterdir()}
    manifest = {"manifest.db", "manifest.db-wal", "manifest.db-shm", "manifest.mark"}
    assert names - writer.state.files <= manifest
    writer.close()


@pytest.mark.parametrize("point", WRITER_POINTS)
def test_a_writer_killed_at_this_step_loses_and_doubles_nothing(tmp_path, point):
    generator = random.Random(point)
    directory = tmp_path / "partition"
    kills = 0
    for life in range(1, 40):
        occurrence = generator.randint(1, 2) if point == "swapped" else generator.randint(2, 14)
        process = start(directory, life, point, occurrence)
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == -9, errors
        kills += 1
        check(directory)
    assert kills >= 2
    finish(directory, 50)


@pytest.mark.parametrize("point", CHILD_POINTS)
def test_a_child_killed_at_this_step_changes_nothing(tmp_path, point):
    directory = tmp_path / "partition"
    process = start(directory, 1, child=point)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    finish(directory, 2)


def test_a_writer_killed_at_any_moment_loses_and_doubles_nothing(tmp_path):
    generator = random.Random(8)
    kills = 0
    for trial in range(3):
        directory = tmp_path / str(trial)
        for life in range(1, 30):
            process = start(directory, life)
            try:
                _, errors = process.communicate(timeout=generator.uniform(0.3, 1.2))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                check(directory)
                continue
            assert process.returncode == 0, errors
            break
        finish(directory, 50)
    assert kills >= 3


def test_the_check_notices_a_planted_loss_and_a_planted_double(tmp_path):
    directory = tmp_path / "partition"
    finish(directory, 1)
    manifest = Manifest.open(directory, SPEC, 10**9)
    victim = manifest.db.execute("SELECT sequence, key FROM applied LIMIT 1").fetchone()
    manifest.db.execute("DELETE FROM applied WHERE sequence = ?", victim[:1])
    with pytest.raises(AssertionError):
        check(directory)  # acknowledged, and not applied
    manifest.db.execute("INSERT INTO applied VALUES (?, ?)", victim)
    check(directory)
    part = manifest.state().segments[-1]
    manifest.close()
    writer = open_writer(directory, 10**9)
    open_part = writer._segments[part.number]
    row = int(np.flatnonzero(open_part.liveness.visible)[0])
    writer._manifest.commit(10**9, Change(deaths={part.number: np.array([row])}))
    writer.close()
    with pytest.raises(AssertionError):
        check(directory)  # a document is missing
    writer = open_writer(directory, 10**9)
    document = open_part.segment.rows.id(row)
    missing = [(document, int(open_part.segment.rows.versions[row]))]
    writer.apply([shard("again", missing)])
    check(directory)
    writer.apply([shard("planted", [("another", 1)])])
    writer.close()
    with pytest.raises(AssertionError):
        check(directory)  # a document too many
