"""How full the queues are and what the workers do, read from Redis in a bounded way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import redis.asyncio

from vecfleet.common import keys
from vecfleet.common.errors import ConfigError
from vecfleet.common.redis_client import translated

MAX_QUEUES = 1000
MAX_WORKERS = 1000
_MOST_LOOKED_AT = 5000  # queues, of which those are shown that are busy
_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class QueueLoad:
    """What waits in one queue, and how many of its jobs are being worked on."""

    queue: str
    jobs: int
    tokens: int
    bytes: int
    in_flight: int
    dead: int  # entries of the dead letter whose time is not over
    parked: int = 0  # of a merge queue: jobs that wait until it has room, counted in no other queue
    parked_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LineLoad:
    """What waits in the queues of all tenants for the same work, parked jobs too."""

    line: str  # {task}.{target}.{lane}, or merge: the merge queues of all collections
    jobs: int
    tokens: int
    bytes: int
    tenants: int  # that have something waiting; 0 for merge, where no turns are taken


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
    """At most ``MAX_QUEUES`` queues and ``MAX_WORKERS`` workers, each by name.

    Of more queues, those before others in which jobs wait or are worked on.
    """

    queues: tuple[QueueLoad, ...]
    workers: tuple[LiveWorker, ...]
    lines: tuple[LineLoad, ...] = ()  # of the queues that were looked at
    queues_left_out: int = 0
    dead_bytes: Mapping[str, int] = field(default_factory=dict)  # by tenant, of those with some


@dataclass(frozen=True, slots=True)
class RedisMemory:
    """What Redis holds, and what it may hold before it refuses to take in more."""

    used_bytes: int
    max_bytes: int  # 0: as much as there is


async def read_redis_memory(client: redis.asyncio.Redis) -> RedisMemory | None:
    """None where this user may not ask; raises ``RedisUnavailable``."""
    try:
        with translated():
            told = await client.info("memory")
    except ConfigError:
        return None
    return RedisMemory(int(told.get("used_memory", 0)), int(told.get("maxmemory", 0)))


async def read_fleet_state(client: redis.asyncio.Redis) -> FleetState:
    """Read the known queues and workers; raises ``RedisUnavailable``."""
    with translated():
        queues = await _members(client, keys.QUEUES, "rq:queue:vf.", _MOST_LOOKED_AT)
        workers = await _members(client, "rq:workers", "rq:worker:", MAX_WORKERS)
        names = [name.removeprefix("rq:queue:") for name in queues]
        people = [name.removeprefix("rq:worker:") for name in workers]
        lines = sorted({_line(name) for name in names})
        if len(names) > MAX_QUEUES:
            names = await _busiest(client, names)
        pipe = client.pipeline(transaction=False)
        now_s, _ = cast(Any, await client.time())
        pipe.scard(keys.QUEUES)
        pipe.hgetall(keys.DEAD_BYTES)
        for name in names:
            pipe.hmget(keys.load(name), "jobs", "tokens", "bytes", "parked_jobs", "parked_bytes")
            pipe.zcard(keys.lease(name))
            pipe.zcount(keys.dead(name), now_s, "+inf")
        for name in lines:
            pipe.hmget(f"vf:sum:{name}", "jobs", "tokens", "bytes")
            pipe.zcard(f"vf:line:{name}")
        for name in people:
            pipe.hgetall(keys.worker(name))
        answers = iter(await pipe.execute())
    in_all = int(next(answers))
    held: dict[bytes, bytes] = next(answers)
    dead_bytes = {_text(tenant): _number(size) for tenant, size in held.items() if tenant != b"*"}
    loads = [_queue(name, next(answers), next(answers), next(answers)) for name in names]
    sums = []
    for name in lines:
        jobs, tokens, size = _numbers(next(answers))
        sums.append(LineLoad(name, jobs, tokens, size, next(answers)))
    live = []
    for name in people:
        raw: dict[bytes, bytes] = next(answers)
        if raw:
            live.append(LiveWorker(name, {_text(k): _text(v) for k, v in raw.items()}))
    left_out = max(0, in_all - len(names)) if len(names) == MAX_QUEUES else 0
    return FleetState(tuple(loads), tuple(live), tuple(sums), left_out, dead_bytes)


async def _busiest(client: redis.asyncio.Redis, names: Sequence[str]) -> list[str]:
    """``MAX_QUEUES`` of the queues, those first in which jobs wait or are worked on; by name."""
    busy: list[str] = []
    rest: list[str] = []
    for start in range(0, len(names), _AT_ONCE):
        some = names[start : start + _AT_ONCE]
        pipe = client.pipeline(transaction=False)
        for name in some:
            pipe.exists(keys.load(name), keys.lease(name))
        for name, is_busy in zip(some, await pipe.execute(), strict=True):
            (busy if is_busy else rest).append(name)
    return sorted([*busy, *rest][:MAX_QUEUES])


def _line(queue: str) -> str:
    line = queue.split(".", 2)[-1]
    return "merge" if line.startswith("merge.") else line


def _queue(name: str, load: Sequence[bytes | None], in_flight: int, dead: int) -> QueueLoad:
    jobs, tokens, size, parked, parked_bytes = _numbers(load)
    return QueueLoad(name, jobs, tokens, size, in_flight, dead, parked, parked_bytes)


def _numbers(values: Sequence[bytes | None]) -> list[int]:
    return [_number(value) for value in values]


def _number(value: bytes | None) -> int:
    """What a script counted; 0 for what it did not: one bad field must not hide all the others."""
    try:
        return int(value or 0)
    except ValueError:
        return 0


async def _members(client: redis.asyncio.Redis, key: str, prefix: str, most: int) -> list[str]:
    """Members of a set that begin with ``prefix``, read in steps and no more than ``most``."""
    found: set[str] = set()
    cursor = 0
    while True:
        cursor, members = cast(Any, await client.sscan(key, cursor, match=f"{prefix}*", count=500))
        found.update(_text(member) for member in members)
        if cursor == 0 or len(found) >= most:
            return sorted(found)[:most]


def _text(value: bytes) -> str:
    return value.decode(errors="replace")
