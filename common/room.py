"""Whether a queue has room, as far as a glance tells: what would be refused need not be read first.

It is a hint, up to ``_FRESH_S`` old. ``enqueue.lua`` decides, and its arithmetic is followed here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis.asyncio

from vecfleet.common import keys
from vecfleet.common.admission import JOB_BYTES, Admission
from vecfleet.common.redis_client import translated

_FRESH_S = 0.1
_MOST_KEPT = 4096

Verdict = tuple[bytes, int, int]  # as enqueue.lua's: what is full, tokens and bytes waiting


@dataclass(frozen=True, slots=True)
class _Glance:
    """What waits, in tokens and bytes, where documents of a collection have to pass."""

    tokens: int
    size: int
    size_of_all: int  # in the queues of all tenants for this work
    unmerged: int
    unmerged_of_all: int
    dead: int
    dead_of_all: int
    tenants_with_dead: int

    def verdict(self, bounds: Admission, tokens: int) -> Verdict:
        """What ``enqueue.lua`` would say to one job of so many tokens, had it next to no bytes."""
        dead_share = bounds.dead_share_bytes(self.dead_of_all, self.tenants_with_dead)
        if bounds.max_dead_bytes and self.dead and self.dead > dead_share:
            return b"dead_full", self.tokens, self.dead
        left = bounds.max_unmerged_bytes - self.unmerged_of_all
        most = max(0, left) if self.unmerged_of_all else bounds.max_merge_bytes
        if self.unmerged > min(bounds.max_merge_bytes, most):
            return b"merge_full", self.tokens, self.unmerged
        if self.tokens and (
            self.tokens + tokens > bounds.max_tokens or self.size + JOB_BYTES > bounds.max_bytes
        ):
            return b"full", self.tokens, self.size
        left = bounds.max_shared_bytes - self.size_of_all
        if self.size_of_all and self.size + JOB_BYTES > max(0, left):
            return b"shared_full", self.tokens, self.size_of_all
        return b"ok", self.tokens, self.size


class Room:
    """Looks at queues of documents; many callers share a look."""

    def __init__(
        self,
        client: redis.asyncio.Redis,
        admission: Admission,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = client
        self._admission = admission
        self._clock = clock
        self._looks: dict[tuple[str, str], tuple[float, asyncio.Task[_Glance]]] = {}

    async def verdict(
        self, queue: keys.QueueName, merge_queue: keys.QueueName, tokens: int
    ) -> Verdict:
        """What an enqueue of so many tokens would be told; raises ``RedisUnavailable``."""
        place = (str(queue), str(merge_queue))
        now = self._clock()
        begun, look = self._looks.get(place, (0.0, None))
        if look is None or now - begun > _FRESH_S:
            if len(self._looks) >= _MOST_KEPT:
                self._looks.clear()
            look = asyncio.create_task(self._look(queue, merge_queue), name="room")
            look.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._looks[place] = (now, look)
        return (await asyncio.shield(look)).verdict(self._admission, tokens)

    async def _look(self, queue: keys.QueueName, merge_queue: keys.QueueName) -> _Glance:
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.hmget(keys.load(queue), ["tokens", "bytes"])
        pipeline.hmget(keys.load_of_all(queue), ["bytes", "tokens"])
        pipeline.hmget(keys.load(merge_queue), ["bytes", "parked_bytes"])
        pipeline.hmget(keys.load_of_all(merge_queue), ["bytes", "tokens"])
        pipeline.hmget(keys.DEAD_BYTES, [queue.tenant, "*"])
        pipeline.hlen(keys.DEAD_BYTES)
        with translated():
            *rows, names = await pipeline.execute(raise_on_error=False)
        (tokens, size), (of_all, _), merges, (unmerged_of_all, _), (dead, dead_of_all) = (
            _numbers(row) for row in rows
        )
        tenants = names - 1 if isinstance(names, int) else 0
        return _Glance(
            tokens, size, of_all, sum(merges), unmerged_of_all, dead, dead_of_all, tenants
        )


def _numbers(row: Any) -> tuple[int, int]:
    """The two numbers of a row; 0 for what is missing or no number: an enqueue finds that out."""
    try:
        first, second = row
        return int(first or 0), int(second or 0)
    except (TypeError, ValueError):
        return 0, 0
