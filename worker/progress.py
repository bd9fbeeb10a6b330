"""Ends a worker in which something hangs, so that others take its jobs over.

A heartbeat tells that a process lives, not that it gets on. Here is watched what could hang with
jobs in hand: the engine (its steps, its tokeniser, its start after a death), the event loop, and
the threads beside it. Where something takes too long, the process ends. What does so is a thread of
the C runtime (``faulthandler``), set anew at each look, because code that hangs with the
interpreter's lock held stops all threads of Python. It prints where each one stood.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from vecfleet.worker.activity import Activity
from vecfleet.worker.engine import Engine

_LOOKS = 8  # while something may go on for that long
_STARTS = 5.0  # so many times as long may an engine take that is started anew
_LEAST_S = 0.01

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Stall:
    what: str
    took_s: float
    most_s: float

    @property
    def left_s(self) -> float:
        return self.most_s - self.took_s


class ProgressWatch:
    """Watches one worker from a thread of its own; one a process."""

    def __init__(
        self,
        engine: Engine,
        max_step_s: float,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
        threads: Mapping[str, Activity] | None = None,
    ) -> None:
        """``max_step_s``: the longest that a step of the engine may take, or anything else.

        ``threads``: what is done beside the ``loop``, each by what is said of it where it hangs.
        """
        self._engine = engine
        self._max_step_s = max_step_s
        self._look_s = max_step_s / _LOOKS
        self._event_loop = loop
        self._threads = dict(threads or {})
        self._loop_asked_at: float | None = None
        self._has_told = False

    def start(self) -> None:
        """Watch until the process ends: what hangs could keep it from ending, too."""
        self._end_in(self._max_step_s)
        threading.Thread(target=self._run, name="progress", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(self._look_s)
            worst = min(self._stalls(), key=lambda stall: stall.left_s)
            self._ask_loop()
            left_s = min(worst.left_s, self._max_step_s)
            if left_s > self._look_s:
                self._end_in(left_s + self._look_s)  # the next look may be late
                self._has_told = False
            elif self._has_told:
                self._end_in(left_s)
            else:
                # Time enough to say why. Not just when the next look comes: a thread that runs can
                # crash the C runtime while it prints where each one stands.
                self._end_in(2 * self._look_s)
                self._has_told = True
                log.error(
                    "%s for %.3g s: this worker ends, and others take its jobs over",
                    worst.what,
                    worst.took_s,
                )

    def _stalls(self) -> Iterator[_Stall]:
        stats, most_s = self._engine.stats, self._max_step_s
        yield _Stall("the engine has done no step", stats.stalled_s, most_s)
        yield _Stall("the engine has been starting anew", stats.loading_s, _STARTS * most_s)
        asked_at = self._loop_asked_at
        loop_s = 0.0 if asked_at is None else time.monotonic() - asked_at
        yield _Stall("the event loop has done nothing", loop_s, most_s)
        for what, activity in self._threads.items():
            yield _Stall(what, activity.stalled_s, most_s)

    def _ask_loop(self) -> None:
        if self._event_loop is not None and self._event_loop.is_closed():
            self._loop_asked_at = self._event_loop = None  # the worker ends
        if self._event_loop is None or self._loop_asked_at is not None:
            return
        self._loop_asked_at = time.monotonic()
        with suppress(RuntimeError):  # it was closed just now
            self._event_loop.call_soon_threadsafe(self._loop_answers)

    def _loop_answers(self) -> None:
        self._loop_asked_at = None

    def _end_in(self, left_s: float) -> None:
        faulthandler.dump_traceback_later(
            max(left_s, _LEAST_S), repeat=False, file=sys.__stderr__ or sys.stderr, exit=True
        )
