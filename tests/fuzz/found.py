"""What Redis has of the jobs that a state machine drives."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from vecfleet.common import keys

EMBED = keys.embed_queue("5pace", "bulk")
MERGE = keys.merge_queue("c0ffee")
SUB = "sub"
BLOCKS = 8


@dataclass
class FoundQueue:
    """A queue as Redis has it."""

    waiting: list[bytes]
    leases: list[bytes]
    dead: list[bytes]
    load: dict[bytes, bytes]
    of_all: dict[bytes, bytes]  # the load of all tenants' queues of its line
    line: list[bytes]


@dataclass
class FoundJob:
    """A job as Redis has it."""

    is_there: bool
    fields: list[bytes | None]  # status, origin, cost
    size: int  # of its data


@dataclass
class Found:
    """All that Redis has."""

    queues: dict[str, FoundQueue]
    jobs: dict[str, FoundJob]
    merged: bytes  # a bit for each block
    dead: bytes
    submission: dict[bytes, bytes]


def look(client: Any) -> Found:
    """Read everything in one round trip: it is done after each step."""
    queues, jobs = (EMBED, MERGE), [f"{SUB}-{n}" for n in range(BLOCKS)]
    pipeline = client.pipeline(transaction=False)
    for queue in queues:
        pipeline.lrange(keys.queue_list(queue), 0, -1)
        pipeline.zrange(keys.lease(queue), 0, -1)
        pipeline.zrange(f"rq:failed:{queue}", 0, -1)
        pipeline.hgetall(keys.load(queue))
        pipeline.hgetall(keys.load_of_all(queue))
        pipeline.zrange(keys.line(queue), 0, -1)
    for job in jobs:
        pipeline.exists(keys.job(job))
        pipeline.hmget(keys.job(job), "status", "origin", "vf_cost")
        pipeline.hstrlen(keys.job(job), "data")
    for mark in ("ok", "bad"):
        pipeline.get(f"{keys.submission(SUB)}:{mark}")
    pipeline.hgetall(keys.submission(SUB))
    told = iter(pipeline.execute())
    return Found(
        {str(queue): FoundQueue(*islice(told, 6)) for queue in queues},
        {job: FoundJob(bool(next(told)), next(told), next(told)) for job in jobs},
        next(told) or b"",
        next(told) or b"",
        next(told),
    )
