"""Warnings about what is met again and again: one line a minute, and how many it stands for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_EVERY_S = 60.0


class RareLog:
    """Lets each warning of a logger through once in ``every_s``."""

    def __init__(
        self,
        log: logging.Logger,
        *,
        every_s: float = _EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._every_s = every_s
        self._clock = clock
        self._said: dict[str, tuple[float, int]] = {}  # by message: when, and how often since then

    def warning(self, message: str, *arguments: object) -> None:
        """As ``logging.Logger.warning``; ``message`` must be one of a few."""
        now = self._clock()
        said_at, unsaid = self._said.get(message, (-self._every_s, 0))
        if now - said_at < self._every_s:
            self._said[message] = said_at, unsaid + 1
            return
        self._said[message] = now, 0
        more = f" (and {unsaid} more like this)" if unsaid else ""
        self._log.warning(message + more, *arguments)
