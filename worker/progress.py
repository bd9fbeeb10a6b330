"""Ends a worker whose engine hangs, so that others take its jobs over.

A heartbeat tells that a process lives, not that its engine does. Here the engine's steps are
watched: with work waiting and none done for too long, the process ends. What does so is a thread of
the C runtime (``faulthandler``), set back whenever there is progress, because an engine that hangs
with the interpreter's lock held stops all threads of Python. It prints where each one stood.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading

from vecfleet.worker.engine import Engine

_LOOKS = 8  # at the engine while one of its steps may take that long

log = logging.getLogger(__name__)


class ProgressWatch:
    """Watches one engine from a thread of its own; one a process."""

    def __init__(self, engine: Engine, max_step_s: float) -> None:
        """``max_step_s``: the longest that a step may take, and half as much again at most."""
        self._engine = engine
        self._max_step_s = max_step_s
        self._look_s = max_step_s / _LOOKS
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._set_back()
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer: the engine is being closed."""
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        steps, idle_looks = -1, 0
        while not self._over.wait(self._look_s):
            stats = self._engine.stats
            if stats.steps != steps or not stats.pending_tokens or stats.is_loading:
                steps, idle_looks = stats.steps, 0
                self._set_back()
                continue
            idle_looks += 1
            if idle_looks == _LOOKS - 1:
                log.error(
                    "the engine has done no step for %.3g s with %d tokens waiting: this worker "
                    "ends, and others take its jobs over",
                    idle_looks * self._look_s,
                    stats.pending_tokens,
                )

    def _set_back(self) -> None:
        faulthandler.dump_traceback_later(
            self._max_step_s, repeat=False, file=sys.__stderr__ or sys.stderr, exit=True
        )
