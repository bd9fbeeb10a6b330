"""Waiting for a Redis that is away: a little longer each time."""

from __future__ import annotations

import logging
import threading

log = logging.getLogger(__name__)

_PAUSES_S = (0.1, 0.2, 0.5, 1.0, 2.0)


class Patience:
    """Pauses between tries; ``over`` ends them at once."""

    def __init__(self, over: threading.Event) -> None:
        self._over = over
        self._failures = 0

    def wait(self, error: Exception) -> None:
        """Say why, and wait; each failure in a row takes longer."""
        log.warning("%s", error)
        self._over.wait(_PAUSES_S[min(self._failures, len(_PAUSES_S) - 1)])
        self._failures += 1

    def renew(self) -> None:
        """It went well."""
        self._failures = 0
