"""What was given and is not done, and for how long nothing of it has got on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Activity:
    """Work under way, told by those who do it; any thread may tell and ask.

    What was ``given`` has to get on as a whole, as it may have to wait for its turn. What somebody
    is ``doing`` has to end by itself, whatever goes on beside it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._given = 0
        self._got_on_at = 0.0
        self._doing: dict[object, float] = {}

    @contextmanager
    def given(self) -> Iterator[None]:
        """Inside, there is something to do."""
        with self._lock:
            if not self._given:
                self._got_on_at = self._clock()
            self._given += 1
        try:
            yield
        finally:
            with self._lock:
                self._given -= 1

    @contextmanager
    def doing(self) -> Iterator[None]:
        """Inside, a part of it is done; its end is progress."""
        token = object()
        with self._lock:
            self._doing[token] = self._clock()
        try:
            yield
        finally:
            with self._lock:
                del self._doing[token]
                self._got_on_at = self._clock()

    def got_on(self) -> None:
        """A part of what was given is done."""
        with self._lock:
            self._got_on_at = self._clock()

    @property
    def stalled_s(self) -> float:
        """For how long something has not got on; 0.0 where there is nothing to do."""
        with self._lock:
            since = list(self._doing.values())
            if self._given:
                since.append(self._got_on_at)
            return max(0.0, self._clock() - min(since)) if since else 0.0
