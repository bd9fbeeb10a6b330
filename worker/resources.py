"""Memory and CPU, looked at every few seconds: how much may be claimed, and when nothing may.

**The window.** Bulk's window is the tokens in flight, plus those that the free memory would hold if
all were in one forward pass (``window_tokens``). That is more than they ever need, and far less
than the largest window where memory is scarce. It shrinks at once and grows back by a quarter of
the largest a look. Two blocks always fit (``Window``).

**The pause.** When the host's memory is used up to a limit, or the CPU is for two looks in a row,
nothing is claimed until it is below 95 % of the limit. What the worker's own fleet computes does
not count, nor what runs with a niceness: the one would stall a worker for its own work, the other
stands back by itself.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from vecfleet.common import keys
from vecfleet.common.settings import FAMILY, process_env
from vecfleet.worker.machine import GpuMemory, read_gpus
from vecfleet.worker.window import ResourceLimits, Window

log = logging.getLogger(__name__)

# A forward pass keeps about sixteen numbers of two bytes for each token and each number of the
# model's width: the states, queries, keys and values, and the wide middle of the feed-forward part.
BYTES_PER_TOKEN_AND_WIDTH = 32
USUAL_WIDTH = 1024  # of a model that does not say: a reranker
GPU_SPARE_PERCENT = 2.0
RESUME_AT = 0.95  # of a limit
AS_AT_START = 0.9  # so much of what was free when the worker began is as good as all of it
GROWTH = 0.25  # of the largest window, a look

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Memory:
    """Some memory."""

    total_bytes: int
    free_bytes: int  # can be had without taking it from anybody

    @property
    def used_percent(self) -> float:
        """How much is used, 0 to 100."""
        return 100.0 * (1 - self.free_bytes / self.total_bytes) if self.total_bytes else 0.0


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the machine."""

    host: Memory
    others_cpu_percent: float
    gpu: Memory | None = None  # of the GPU that the model is on


class Gauge(Protocol):
    """Where readings come from."""

    def read(self) -> Reading:
        """Look now."""
        ...

    def close(self) -> None:
        """Look no more."""
        ...


def window_tokens(
    memory: Memory, *, spare_percent: float, bytes_per_token: int, in_flight: int, most: int
) -> int:
    """Tokens that may be in flight, 1 to ``most``: those that are, and what free memory holds.

    ``spare_percent`` of the memory is left alone; where less is free, the window is smaller than
    what is in flight.
    """
    free = memory.free_bytes - memory.total_bytes * spare_percent / 100
    return max(1, min(most, in_flight + int(free // bytes_per_token)))


class ResourceWatch:
    """Moves and pauses a worker's windows. ``check`` is called by one thread, now and again."""

    def __init__(
        self,
        windows: Mapping[keys.Lane, Window],
        limits: ResourceLimits,
        gauge: Gauge,
        *,
        width: int = 0,
    ) -> None:
        """``width`` is that of the model's states; 0 where it is unknown."""
        self._windows = windows
        self._bulk = windows["bulk"]
        self._most = self._bulk.max_tokens
        self._limits = limits
        self._gauge = gauge
        self._bytes_per_token = (width or USUAL_WIDTH) * BYTES_PER_TOKEN_AND_WIDTH
        self._gpu_at_start: int | None = None
        self._reading: Reading | None = None
        self._paused = ""

    @property
    def paused(self) -> str:
        """Why nothing is claimed; empty while something is."""
        return self._paused

    def check(self) -> None:
        """Look once, and do what follows from it."""
        reading, before = self._gauge.read(), self._reading
        self._reading = reading
        self._bulk.limit(self._next_limit(reading))
        # A burst that is over by the next look is no reason to stop.
        cpu_percent = min(reading.others_cpu_percent, before.others_cpu_percent if before else 0.0)
        why = self._why_pause(reading.host.used_percent, cpu_percent)
        if why and not self._paused:
            log.warning("claims nothing: %s", why)
        elif self._paused and not why:
            log.warning("claims again")
        self._paused = why
        for window in self._windows.values():
            window.pause(bool(why))

    def fields(self) -> dict[str, str | int | float]:
        """For ``vf:worker:{worker}``."""
        found: dict[str, str | int | float] = {
            "paused": self._paused,
            "bulk_window_tokens": self._bulk.max_tokens,
        }
        if self._reading is not None:
            found["memory_percent"] = round(self._reading.host.used_percent, 1)
            found["others_cpu_percent"] = round(self._reading.others_cpu_percent, 1)
            if self._reading.gpu is not None:
                found["gpu_memory_percent"] = round(self._reading.gpu.used_percent, 1)
        return found

    def close(self) -> None:
        """Let go of the gauge."""
        self._gauge.close()

    def _next_limit(self, reading: Reading) -> int:
        wanted = self._wanted(reading)
        return min(wanted, self._bulk.max_tokens + int(self._most * GROWTH))

    def _wanted(self, reading: Reading) -> int:
        memory, spare = reading.host, 100 - self._limits.memory_percent
        if reading.gpu is not None:
            memory, spare = reading.gpu, GPU_SPARE_PERCENT
            if self._gpu_at_start is None:
                self._gpu_at_start = memory.free_bytes
            if memory.free_bytes >= AS_AT_START * self._gpu_at_start:
                return self._most  # the engine has long taken what it needs
        return window_tokens(
            memory,
            spare_percent=spare,
            bytes_per_token=self._bytes_per_token,
            in_flight=self._bulk.in_flight[1],
            most=self._most,
        )

    def _why_pause(self, memory_percent: float, cpu_percent: float) -> str:
        limits = self._limits
        for what, used, limit in (
            ("of the host's memory is used", memory_percent, limits.memory_percent),
            ("of the CPU is used by others", cpu_percent, limits.cpu_percent),
        ):
            line = limit * RESUME_AT if self._paused.endswith(what) else limit
            if limit < 100 and used >= line:
                return f"{used:.0f} % {what}"
        return ""


class MachineGauge:
    """Reads this machine; ``device`` is the engine's, as "cpu" or "cuda:0"."""

    def __init__(self, device: str) -> None:
        self._cpu = OthersCpu()
        self._gpu: GpuMemory | None = None
        kind, _, number = device.partition(":")
        if kind == "cuda":
            gpus = read_gpus()
            place = int(number or 0)
            self._gpu = GpuMemory(gpus[place].uuid) if place < len(gpus) else None

    def read(self) -> Reading:
        """See ``Gauge.read``."""
        total, free = self._gpu.read() if self._gpu is not None else (0, 0)
        gpu = Memory(total, free) if total else None
        return Reading(host_memory(), self._cpu.percent(), gpu)

    def close(self) -> None:
        """See ``Gauge.close``."""
        if self._gpu is not None:
            self._gpu.close()


def host_memory(cgroup: Path = _CGROUP) -> Memory:
    """The host's memory, or that of the container, whichever has less free."""
    found = psutil.virtual_memory()
    host = Memory(found.total, found.available)
    try:
        most = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        lines = (cgroup / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # there is none, or it has no limit ("max")
        return host
    stat = dict(line.split() for line in lines)
    kept = int(stat.get("inactive_file", 0))  # the kernel's copies of files, given up on demand
    container = Memory(most, max(0, most - used + kept))
    return min(host, container, key=lambda memory: memory.free_bytes)


class OthersCpu:
    """How much of the CPU is used by processes that are neither of our fleet nor stand back."""

    def __init__(self) -> None:
        self._root = _family_root()
        self._before = self._look()

    def percent(self) -> float:
        """0 to 100, since the last call."""
        now, before = self._look(), self._before
        self._before = now
        total, busy, niced, ours = (a - b for a, b in zip(now, before, strict=True))
        if total <= 0:
            return 0.0
        # Either is an upper bound; what is both niced and ours must not be taken off twice.
        return min(100.0, max(0.0, 100 * min(busy - niced, busy - ours) / total))

    def _look(self) -> tuple[float, float, float, float]:
        """Seconds of all cores, of those that were busy, niced, and ours."""
        times = psutil.cpu_times()
        guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # in user, nice
        total = sum(times) - guest
        idle = times.idle + getattr(times, "iowait", 0.0)
        return total, total - idle, getattr(times, "nice", 0.0), self._ours()

    def _ours(self) -> float:
        """Of the living, and of the dead whom they have waited for: so none is lost."""
        seconds = 0.0
        with contextlib.suppress(psutil.Error):
            for process in (self._root, *self._root.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    used = process.cpu_times()
                    seconds += used.user + used.system + used.children_user + used.children_system
        return seconds


def _family_root() -> psutil.Process:
    """The topmost supervisor that we stand under, else ourselves."""
    own = psutil.Process()
    said = process_env(FAMILY).partition("-")[0]
    if not said.isdecimal():
        return own
    return next((one for one in own.parents() if one.pid == int(said)), own)
