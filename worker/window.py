"""Credits: how many tokens, jobs and bytes of one lane may be in flight in one worker."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from vecfleet.common.limits import WINDOW_TOKENS

MAX_BYTES = 128 << 20  # of jobs' data in flight, unless told otherwise


_HELD_STEPS = 3  # that the engine never waits for the next one
_HELD_S = 0.1


def interactive_tokens(tokens_per_s: float, step_tokens: int) -> int:
    """How many tokens of queries a worker holds, at a rate that 0 stands for while it is unknown.

    What it holds is computed in the order of arrival, whosever it is: who comes next, of another
    tenant too, waits for it. What stays in Redis is claimed by turns.
    """
    if not step_tokens:
        return WINDOW_TOKENS
    return min(WINDOW_TOKENS, max(_HELD_STEPS * step_tokens, int(_HELD_S * tokens_per_s)))


@dataclass(frozen=True, slots=True)
class Room:
    """What may be claimed now."""

    jobs: int
    tokens: int
    bytes: int


@dataclass(frozen=True, slots=True)
class ResourceLimits:
    """When a worker's windows are paused; 100 means never."""

    memory_percent: float = 90.0  # of the host's memory
    cpu_percent: float = 90.0  # of the CPU, as others use it
    check_s: float = 3.0


class Window:
    """A bounded number of tokens, jobs and bytes in flight.

    The bytes bound the memory of the process, which tokens do only as long as those who enqueue
    tell them right: they have no exception but one job that is alone.

    There is always room for ``min_jobs`` jobs, however long their texts: with fewer than two
    blocks in flight the engine would stand still while the next one is on its way. Only a window
    that is paused has room for nothing.
    """

    def __init__(
        self, *, max_tokens: int, max_jobs: int, min_jobs: int = 1, max_bytes: int = MAX_BYTES
    ) -> None:
        self._max_tokens = max_tokens
        self._max_jobs = max_jobs
        self._min_jobs = min_jobs
        self._max_bytes = max_bytes
        self._tokens = 0
        self._bytes = 0
        self._jobs = 0
        self._paused = False
        self._changed = threading.Condition()

    def room(self) -> Room | None:
        """What may be claimed now, None when nothing may."""
        if self._paused:
            return None
        jobs = self._max_jobs - self._jobs
        tokens = self._max_tokens - self._tokens
        size = self._max_bytes - self._bytes
        if jobs <= 0 or size <= 0 or (tokens <= 0 and self._jobs >= self._min_jobs):
            return None
        if tokens <= 0:
            return Room(self._min_jobs - self._jobs, 1, size)
        return Room(jobs, tokens, size)

    def wait_for_room(self, timeout_s: float) -> Room | None:
        """Block until something may be claimed; None when that took longer than ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self.room() is not None, timeout_s)
            return self.room()

    def take(self, tokens: int, size: int = 0) -> None:
        """A job of ``tokens`` in ``size`` bytes is in flight."""
        with self._changed:
            self._tokens += tokens
            self._bytes += size
            self._jobs += 1

    def give_back(self, tokens: int, size: int = 0) -> None:
        """That job is settled."""
        with self._changed:
            self._tokens -= tokens
            self._bytes -= size
            self._jobs -= 1
            self._changed.notify_all()

    def limit(self, max_tokens: int) -> None:
        """From now on so many tokens may be in flight; what is above that is worked off."""
        with self._changed:
            self._max_tokens = max_tokens
            self._changed.notify_all()

    def pause(self, paused: bool) -> None:
        """Claim nothing while ``paused``; what is in flight goes on."""
        with self._changed:
            self._paused = paused
            self._changed.notify_all()

    @property
    def max_tokens(self) -> int:
        """How many tokens may be in flight now."""
        return self._max_tokens

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Block until nothing is in flight; False when that took longer than ``timeout_s``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._jobs == 0, timeout_s)

    @property
    def in_flight(self) -> tuple[int, int]:
        """Jobs and tokens in flight."""
        return self._jobs, self._tokens
