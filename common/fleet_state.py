"""How full the queues are and what the workers do, read from Redis in a bounded way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import redis.asyncio

from vecfleet.common import keys
from vecfleet.common.redis_client import translated

MAX_QUEUES = 1000
MAX_WORKERS = 1000


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """What waits in one queue, and how many of its jobs are being worked on."""

    queue: str
    jobs: int
    tokens: int
    bytes: int
    in_flight: int
    dead: int


@dataclass(frozen=True, slots=True)
class LiveWorker:
    """One worker that shows itself."""

    name: str
    fields: dict[str, str]  # what its heartbeat says: model, tokens_per_s, state, ...

    @property
    def paused(self) -> str:
        """Why it claims nothing; empty where it does."""
        return self.fields.get("paused", "")

    @property
    def tokens_per_s(self) -> float:
        """Its rate; 0.0 where it tells none."""
        try:
            return float(self.fields.get("tokens_per_s", 0))
        except ValueError:
            return 0.0


@dataclass(frozen=True, slots=True)
class FleetState:
    """At most ``MAX_QUEUES`` queues and ``MAX_WORKERS`` workers, each by name."""

    queues: tuple[QueueLoad, ...]
    workers: tuple[LiveWorker, ...]


async def read_fleet_state(client: redis.asyncio.Redis) -> FleetState:
    """Read the known queues and workers; raises ``RedisUnavailable``."""
    with translated():
        queues = await _members(client, keys.QUEUES, "rq:queue:vf.", MAX_QUEUES)
        workers = await _members(client, "rq:workers", "rq:worker:", MAX_WORKERS)
        names = [name.removeprefix("rq:queue:") for name in queues]
        people = [name.removeprefix("rq:worker:") for name in workers]
        pipe = client.pipeline(transaction=False)
        for name in names:
            pipe.hmget(keys.load(name), "jobs", "tokens", "bytes")
            pipe.zcard(keys.lease(name))
            pipe.zcard(f"rq:failed:{name}")
        for name in people:
            pipe.hgetall(keys.worker(name))
        answers = iter(await pipe.execute())
    loads = []
    for name in names:
        jobs, tokens, size = (int(value or 0) for value in next(answers))
        loads.append(QueueLoad(name, jobs, tokens, size, next(answers), next(answers)))
    live = []
    for name in people:
        raw: dict[bytes, bytes] = next(answers)
        if raw:
            live.append(LiveWorker(name, {k.decode(): _text(v) for k, v in raw.items()}))
    return FleetState(tuple(loads), tuple(live))


async def _members(client: redis.asyncio.Redis, key: str, prefix: str, most: int) -> list[str]:
    """Members of a set that begin with ``prefix``, read in steps and no more than ``most``."""
    found: set[str] = set()
    cursor = 0
    while True:
        cursor, members = cast(Any, await client.sscan(key, cursor, match=f"{prefix}*", count=500))
        found.update(member.decode() for member in members)
        if cursor == 0 or len(found) >= most:
            return sorted(found)[:most]


def _text(value: bytes) -> str:
    return value.decode(errors="replace")
