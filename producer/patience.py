"""How long to put up with a trouble before giving up."""

from __future__ import annotations

import time
from collections.abc import Callable

from vecfleet.common.errors import VecfleetError

_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.5


class Patience:
    """Waits longer and longer, and ends ``patience_s`` after the trouble began."""

    def __init__(self, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._since: float | None = None
        self._pause_s = _FIRST_PAUSE_S
        self.trouble = ""

    def ok(self) -> None:
        """It works again."""
        self._since = None
        self._pause_s = _FIRST_PAUSE_S
        self.trouble = ""

    def failed(self, error: VecfleetError) -> float:
        """How long to wait before the next try, in seconds; raises ``error`` at the end."""
        now = self._clock()
        if self._since is None:
            self._since = now
        if now - self._since >= self._patience_s:
            raise type(error)(
                f"{error.message} (gave up after {self._patience_s:g} s)",
                retry_after_s=error.retry_after_s,
            ) from error
        self.trouble = error.message
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return pause_s
