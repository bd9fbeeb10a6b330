"""Which GPUs there are, as NVML tells it and CUDA_VISIBLE_DEVICES narrows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from vecfleet.worker import machine
from vecfleet.worker.machine import GpuMemory, read_gpus


class NVMLError(Exception):
    pass


class FakeNvml:
    """NVML over cards: (uuid, total, free, [parts that it is cut into])."""

    NVMLError = NVMLError

    def __init__(self, *cards: tuple[str, int, int, list[tuple[str, int, int]]]) -> None:
        self._cards = cards
        self._all = {card[0]: card for card in cards}
        self._all |= {part[0]: (*part, []) for card in cards for part in card[3]}

    def nvmlDeviceGetCount(self) -> int:
        return len(self._cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self._cards[index][0]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        if handle not in self._all:
            raise NVMLError("lost")
        return SimpleNamespace(total=self._all[handle][1], free=self._all[handle][2])

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        if handle.startswith("MIG"):
            raise NVMLError("ask the whole")
        return (9, 0)

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return b"a card"

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:
        if handle == "GPU-old":
            raise NVMLError("not supported")
        return (int(bool(self._all[handle][3])),) * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, place: int) -> str:
        parts = self._all[handle][3]
        if place % 2 or place // 2 >= len(parts):
            raise NVMLError("not found")
        return parts[place // 2][0]


Use = Any


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    def put(library: FakeNvml | None, visible: str | None = None) -> None:
        @contextmanager
        def nvml() -> Iterator[FakeNvml | None]:
            yield library

        monkeypatch.setattr(machine, "nvml", nvml)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return put


TWO = FakeNvml(("GPU-aa11", 80, 70, []), ("GPU-old", 40, 30, []))
CUT = FakeNvml(("GPU-aa11", 80, 70, [("MIG-1", 10, 9), ("MIG-2", 20, 19)]), ("GPU-bb", 40, 30, []))


def uuids() -> list[str]:
    return [gpu.uuid for gpu in read_gpus()]


def test_without_a_driver_there_is_none(use: Use) -> None:
    use(None)
    assert read_gpus() == ()
    assert GpuMemory("GPU-aa11").read() == (0, 0)


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, ["GPU-aa11", "GPU-old"]),
        ("1", ["GPU-old"]),
        ("1,0", ["GPU-old", "GPU-aa11"]),
        ("GPU-aa", ["GPU-aa11"]),
        ("0,9,1", ["GPU-aa11"]),
        ("", []),
        ("-1", []),
    ],
)
def test_what_is_visible_and_in_which_order(use: Use, visible: str | None, seen: list[str]) -> None:
    use(TWO, visible)
    assert uuids() == seen
    assert [gpu.index for gpu in read_gpus()] == list(range(len(seen)))


def test_a_gpu_that_is_cut_counts_as_its_instances(use: Use) -> None:
    use(CUT)
    assert uuids() == ["MIG-1", "MIG-2", "GPU-bb"]
    assert [gpu.total_bytes for gpu in read_gpus()] == [10, 20, 40]
    use(CUT, "MIG-2")
    assert uuids() == ["MIG-2"]


def test_memory_is_read_again_and_a_lost_gpu_says_nothing(use: Use) -> None:
    use(TWO)
    memory = GpuMemory("GPU-aa11")
    assert memory.read() == (80, 70)
    memory.close()
    assert GpuMemory("GPU-gone").read() == (0, 0)
