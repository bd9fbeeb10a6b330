"""Long work in small pieces, so that other requests get their turn in between."""

from __future__ import annotations

import asyncio
import time

_TURN_S = 0.004


class Turns:
    """What one request computes, measured in time: entries of one kind cost very differently."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    async def give(self) -> None:
        """Let others go first, where this one has had its few milliseconds."""
        if time.perf_counter() - self._since > _TURN_S:
            await asyncio.sleep(0)
            self._since = time.perf_counter()
