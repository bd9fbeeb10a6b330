"""The window follows the memory, and a worker pauses: with readings that are made up."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vecfleet.worker import resources
from vecfleet.worker.resources import (
    Memory,
    OthersCpu,
    Reading,
    ResourceWatch,
    host_memory,
    window_tokens,
)
from vecfleet.worker.window import ResourceLimits, Window

GIB = 1 << 30
MOST = 100_000
PER_TOKEN = 1024 * 32
PLENTY = Reading(Memory(100 * GIB, 80 * GIB), 5.0)


@dataclass
class FakeGauge:
    """Whatever the test says."""

    reading: Reading = PLENTY
    closed: bool = False

    def read(self) -> Reading:
        return self.reading

    def close(self) -> None:
        self.closed = True


class Watched:
    def __init__(self, limits: ResourceLimits | None = None, reading: Reading = PLENTY) -> None:
        self.gauge = FakeGauge(reading)
        self.bulk = Window(max_tokens=MOST, max_jobs=32, min_jobs=2)
        self.interactive = Window(max_tokens=MOST, max_jobs=32)
        windows: Any = {"bulk": self.bulk, "interactive": self.interactive}
        self.watch = ResourceWatch(windows, limits or ResourceLimits(), self.gauge)

    def look(self, **changes: Any) -> Watched:
        self.gauge.reading = replace(self.gauge.reading, **changes)
        self.watch.check()
        return self

    @property
    def claims(self) -> bool:
        rooms = self.bulk.room(), self.interactive.room()
        assert (rooms[0] is None) == (rooms[1] is None)
        return rooms[0] is not None


def host(used_percent: float) -> Memory:
    return Memory(100 * GIB, int((100 - used_percent) * GIB))


# The window


def test_with_plenty_of_memory_the_window_is_whole() -> None:
    assert Watched().look().bulk.max_tokens == MOST


def test_where_memory_is_scarce_the_window_is_what_is_in_flight_and_what_fits() -> None:
    watched = Watched()
    watched.bulk.take(5_000)
    watched.look(host=Memory(100 * GIB, 10 * GIB + 1000 * PER_TOKEN))
    assert watched.bulk.max_tokens == 6_000
    watched.look(host=Memory(100 * GIB, 10 * GIB - 2000 * PER_TOKEN))
    assert watched.bulk.max_tokens == 3_000
    assert watched.watch.fields()["bulk_window_tokens"] == 3_000


def test_two_blocks_always_fit_and_interactive_is_left_alone() -> None:
    watched = Watched(ResourceLimits(memory_percent=100, cpu_percent=100))
    watched.look(host=Memory(100 * GIB, 0))
    assert watched.bulk.max_tokens == 1
    assert watched.interactive.max_tokens == MOST
    assert watched.claims
    watched.bulk.take(500)
    assert watched.claims
    watched.bulk.take(500)
    assert watched.bulk.room() is None


def test_it_shrinks_at_once_and_grows_back_step_by_step() -> None:
    watched = Watched().look(host=Memory(100 * GIB, 10 * GIB))
    assert watched.bulk.max_tokens == 1
    seen = [watched.look(host=host(20)).bulk.max_tokens for _ in range(5)]
    assert seen == [25_001, 50_001, 75_001, MOST, MOST]


def test_on_a_gpu_its_own_memory_counts() -> None:
    watched = Watched(reading=replace(PLENTY, gpu=Memory(24 * GIB, 20 * GIB))).look()
    assert watched.bulk.max_tokens == MOST
    watched.look(host=host(89))
    assert watched.bulk.max_tokens == MOST
    spare = int(24 * GIB * 0.02)
    watched.look(gpu=Memory(24 * GIB, spare + 700 * PER_TOKEN))
    assert watched.bulk.max_tokens == pytest.approx(700, abs=1)
    assert watched.claims
    assert watched.watch.fields()["gpu_memory_percent"] == pytest.approx(97.9, abs=0.1)


def test_an_engine_that_took_the_whole_gpu_before_is_no_reason() -> None:
    watched = Watched(reading=replace(PLENTY, gpu=Memory(24 * GIB, 1 << 20))).look()
    assert watched.bulk.max_tokens == MOST
    watched.look(gpu=Memory(24 * GIB, 0))
    assert watched.bulk.max_tokens == 1


@given(
    total=st.integers(1, 1 << 42),
    free=st.floats(0, 1),
    more=st.floats(0, 1),
    in_flight=st.integers(0, 2 * MOST),
    each=st.integers(1, 1 << 20),
)
def test_more_memory_never_means_a_smaller_window(
    total: int, free: float, more: float, in_flight: int, each: int
) -> None:
    def tokens(share: float) -> int:
        return window_tokens(
            Memory(total, int(total * share)),
            spare_percent=10,
            bytes_per_token=each,
            in_flight=in_flight,
            most=MOST,
        )

    assert 1 <= tokens(free) <= MOST
    low, high = sorted((free, more))
    assert tokens(low) <= tokens(high)


# The pause


def test_at_the_limit_nothing_is_claimed_and_it_resumes_below_it() -> None:
    watched = Watched().look(host=host(89))
    assert watched.claims
    assert watched.watch.paused == ""
    watched.look(host=host(91))
    assert not watched.claims
    assert watched.watch.paused == "91 % of the host's memory is used"
    assert watched.watch.fields()["paused"] == watched.watch.paused
    assert not watched.look(host=host(87)).claims  # not yet
    assert watched.look(host=host(85)).claims
    assert watched.look(host=host(87)).claims
    assert watched.watch.fields()["paused"] == ""


def test_what_others_use_of_the_cpu_counts_as_well() -> None:
    watched = Watched().look(others_cpu_percent=95.0)
    assert watched.claims  # it may be a burst
    assert not watched.look(others_cpu_percent=90.0).claims
    assert watched.watch.paused == "90 % of the CPU is used by others"
    assert not watched.look(others_cpu_percent=86.0).claims
    watched.look(others_cpu_percent=85.0, host=host(95))
    assert watched.watch.paused == "95 % of the host's memory is used"
    assert watched.look(others_cpu_percent=86.0, host=host(20)).claims


def test_a_hundred_percent_means_never() -> None:
    watched = Watched(ResourceLimits(100, 100))
    assert watched.look(host=Memory(100 * GIB, 0), others_cpu_percent=100.0).claims


def test_a_limit_of_one_percent_pauses_and_comes_back() -> None:
    watched = Watched(ResourceLimits(memory_percent=1)).look(host=host(1.5))
    assert not watched.claims
    assert watched.look(host=host(0.5)).claims


def test_what_runs_goes_on_while_it_is_paused() -> None:
    watched = Watched()
    watched.bulk.take(10)
    watched.look(host=host(95))
    watched.bulk.give_back(10)
    assert watched.bulk.wait_until_empty(0)
    watched.watch.close()
    assert watched.gauge.closed


# What the machine says


def test_the_containers_limit_is_the_hosts_where_it_is_less(tmp_path: Path) -> None:
    whole = psutil.virtual_memory().total
    assert host_memory(tmp_path).total_bytes == whole
    (tmp_path / "memory.current").write_text(f"{3 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {1 << 20}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory(tmp_path).total_bytes == whole
    (tmp_path / "memory.max").write_text(f"{4 << 20}\n")
    found = host_memory(tmp_path)
    assert found == Memory(4 << 20, 2 << 20)
    assert found.used_percent == 50


class FakeTimes:
    """The machine's seconds, and those of our own processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cpu: dict[str, float] = dict.fromkeys(("user", "nice", "system", "idle"), 100.0)
        self.ours = {"user": 10.0, "system": 1.0, "children_user": 0.0, "children_system": 0.0}
        monkeypatch.setattr(resources.psutil, "cpu_times", self._times)
        process = SimpleNamespace(
            children=lambda recursive: [], cpu_times=lambda: SimpleNamespace(**self.ours)
        )
        monkeypatch.setattr(resources, "_family_root", lambda: process)

    def _times(self) -> Any:
        return namedtuple("scputimes", self.cpu)(**self.cpu)


def test_neither_our_own_work_nor_what_stands_back_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = FakeTimes(monkeypatch)
    cpu = OthersCpu()
    assert cpu.percent() == 0.0  # no time has passed

    times.cpu["user"] += 60
    times.cpu["idle"] += 40
    assert cpu.percent() == 60.0

    times.cpu["user"] += 60
    times.cpu["idle"] += 40
    times.ours["user"] += 50
    assert cpu.percent() == 10.0

    times.ours["children_user"], times.ours["user"] = times.ours["user"], 0.0  # a child has ended
    times.cpu["nice"] += 80  # we and others at a niceness
    times.cpu["user"] += 20
    times.ours["children_user"] += 50
    assert cpu.percent() == 20.0

    times.cpu["idle"] += 100
    times.ours["user"] += 30  # more than the machine: clocks differ
    assert cpu.percent() == 0.0


def test_the_family_is_that_of_the_supervisor_above(monkeypatch: pytest.MonkeyPatch) -> None:
    own = psutil.Process()
    assert resources._family_root() == own
    monkeypatch.setenv("_VECFLEET_FAMILY", f"{own.parent().pid}-x/{own.pid}-y")
    assert resources._family_root() == own.parent()
    monkeypatch.setenv("_VECFLEET_FAMILY", "999999999-x")
    assert resources._family_root() == own


def test_a_busy_process_of_another_family_is_seen_and_ours_is_not() -> None:
    """On the real machine: seconds of our own child are taken off."""
    cpu = OthersCpu()
    code = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert cpu._look()[3] - cpu._before[3] >= 0.45
    assert 0.0 <= cpu.percent() <= 100.0
