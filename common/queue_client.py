"""Putting jobs into queues: the one way in, for the gateway and for producers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis.asyncio

from vecfleet.common import keys
from vecfleet.common.errors import JobCancelled, QueueFull
from vecfleet.common.redis_client import read_lua, translated

_FOLDER = Path(__file__).parent
ALREADY_QUEUED, ALREADY_COMMITTED, ALREADY_REFUSED = -1, -2, -3


@dataclass(frozen=True, slots=True)
class NewJob:
    """One job on its way into a queue."""

    id: str
    data: bytes  # codec.pack_call(...)
    tokens: int  # estimated cost
    block: int = 0  # its place in the submission
    documents: int = 0


@dataclass(frozen=True, slots=True)
class Admission:
    """How much may wait in one queue, and in the merge queue behind it."""

    max_tokens: int = 4_000_000
    max_bytes: int = 256 << 20
    max_merge_bytes: int = 512 << 20


@dataclass(frozen=True, slots=True)
class Route:
    """Where the answer of a job goes, and what its block belongs to."""

    box: str = ""  # the reply box of a client that waits
    deadline_ms: int = 0  # dropped when not claimed within this time; 0 waits for ever
    submission: str = ""
    merge_queue: str = ""
    version_uid: str = ""  # the collection whose enqueue assigns versions; "" where none is


@dataclass(frozen=True, slots=True)
class Admitted:
    """What an enqueue call did."""

    numbers: tuple[int, ...]  # a job's version, 0, or one of the ALREADY_ numbers
    waiting_tokens: int
    waiting_bytes: int


class QueueClient:
    """Enqueue and cancel; needs the rights of a producer only."""

    def __init__(self, client: redis.asyncio.Redis, admission: Admission | None = None) -> None:
        """``admission`` holds the limits that every call is checked against."""
        self._redis = client
        self._admission = admission or Admission()
        self._enqueue = client.register_script(read_lua(_FOLDER, "enqueue"))
        self._cancel = client.register_script(read_lua(_FOLDER, "cancel"))

    async def enqueue(
        self, queue: keys.QueueName, jobs: Sequence[NewJob], route: Route | None = None
    ) -> Admitted:
        """Admit all ``jobs`` or none.

        Enqueuing the same job again changes nothing and is told apart in ``numbers``.
        Raises ``QueueFull`` past the limits, ``JobCancelled`` when the submission was cancelled.
        """
        route = route or Route()
        sub = keys.submission(route.submission)
        arguments: list[Any] = [
            str(queue),
            datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            self._admission.max_tokens,
            self._admission.max_bytes,
            route.box,
            route.deadline_ms,
            route.submission,
            route.merge_queue,
            self._admission.max_merge_bytes,
            "1" if route.version_uid else "",
        ]
        for job in jobs:
            arguments += (job.id, job.block, job.tokens, job.documents, job.data)
        names = [
            keys.queue_list(queue),
            keys.load(queue),
            keys.bell(queue),
            keys.QUEUES,
            sub,
            f"{sub}:ok",
            f"{sub}:bad",
            keys.version(route.version_uid),
            keys.load(route.merge_queue),
        ]
        with translated():
            verdict, tokens, size, *numbers = await self._enqueue(keys=names, args=arguments)
        self._check(verdict, tokens, size, queue)
        return Admitted(tuple(numbers), tokens, size)

    def _check(self, verdict: bytes, tokens: int, size: int, queue: keys.QueueName) -> None:
        if verdict == b"full":
            raise QueueFull(
                f"the {queue.lane} queue of this model holds {tokens} tokens in {size} bytes; "
                "try again later"
            )
        if verdict == b"merge_full":
            raise QueueFull(
                f"{size} bytes of vectors wait to be merged into this collection; try again later"
            )
        if verdict == b"cancelled":
            raise JobCancelled("the submission was cancelled")

    async def cancel(self, job_ids: Iterable[str]) -> int:
        """Forget jobs that wait and fence off those that run; returns how many there were."""
        names = [keys.job(job_id) for job_id in job_ids]
        if not names:
            return 0
        with translated():
            return int(await self._cancel(keys=names))
