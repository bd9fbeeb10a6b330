"""Putting jobs into queues: the one way in, for the gateway and for producers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis.asyncio

from vecfleet.common import keys, limits
from vecfleet.common.admission import Admission
from vecfleet.common.errors import InvalidInput, JobCancelled, QueueFull, VecfleetError, from_wire
from vecfleet.common.redis_client import read_lua, translated
from vecfleet.common.room import Room

_FOLDER = Path(__file__).parent
_MOST_TOGETHER = 64  # calls; Redis serves nobody else while it runs one of ours
_DEAD_RETRY_S = 30.0  # people have to look at it first
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
class Route:
    """Where the answer of a job goes, and what its block belongs to."""

    box: str = ""  # the reply box of a client that waits
    deadline_ms: int = 0  # dropped when not claimed within this time; 0 waits for ever
    max_ahead: int = 0  # tokens that may be served before it; 0 for any number
    submission: str = ""
    merge_queue: str = ""
    version_uid: str = ""  # the collection whose enqueue assigns versions; "" where none is


@dataclass(frozen=True, slots=True)
class Admitted:
    """What an enqueue call did."""

    numbers: tuple[int, ...]  # a job's version, 0, or one of the ALREADY_ numbers


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An enqueue call that goes together with others."""

    jobs: Sequence[NewJob]
    told: asyncio.Future[Admitted]

    @property
    def tokens(self) -> int:
        """What its jobs cost together."""
        return sum(job.tokens for job in self.jobs)

    def admit(self, admitted: Admitted, at: int) -> None:
        """Pass on this call's part of what was admitted."""
        if not self.told.done():
            numbers = admitted.numbers[at : at + len(self.jobs)]
            self.told.set_result(Admitted(numbers))

    def refuse(self, error: Exception) -> None:
        """Pass on what went wrong; each caller gets an error of its own to add to."""
        if not self.told.done():
            own = from_wire(error.to_wire()) if isinstance(error, VecfleetError) else error
            self.told.set_exception(own)


def _first_of(gathered: Sequence[_Waiting], route: Route) -> list[_Waiting]:
    """Those that go together next.

    Of what waits before a call only others are counted, not those that come in with it: so where
    that is limited, few may.
    """
    most = max(1, route.max_ahead // 4) if route.max_ahead else math.inf
    together = [gathered[0]]
    tokens = gathered[0].tokens
    for waiting in gathered[1:_MOST_TOGETHER]:
        tokens += waiting.tokens
        if tokens > most:
            break
        together.append(waiting)
    return together


def client_scripts() -> list[str]:
    """The scripts that clients run, for those who may load scripts to load them."""
    return [read_lua(_FOLDER, name) for name in ("enqueue", "cancel", "submission", "dead_letter")]


class QueueClient:
    """Enqueue and cancel; needs the rights of a producer only."""

    def __init__(self, client: redis.asyncio.Redis, admission: Admission | None = None) -> None:
        """``admission`` holds the limits that every call is checked against."""
        self._redis = client
        self._admission = admission or Admission()
        self._room = Room(client, self._admission)
        self._gathering: dict[tuple[str, Route], list[_Waiting]] = {}
        self._sending: set[asyncio.Task[None]] = set()
        self._enqueue = client.register_script(read_lua(_FOLDER, "enqueue"))
        self._cancel = client.register_script(read_lua(_FOLDER, "cancel"))

    async def check_room(
        self, queue: keys.QueueName, merge_queue: keys.QueueName, tokens: int
    ) -> None:
        """Raise ``QueueFull`` where documents of so many tokens would be refused, at a glance."""
        verdict, waiting, size = await self._room.verdict(queue, merge_queue, tokens)
        self._check(verdict, waiting, size, queue, Route())

    async def enqueue(
        self, queue: keys.QueueName, jobs: Sequence[NewJob], route: Route | None = None
    ) -> Admitted:
        """Admit all ``jobs`` or none.

        Enqueuing the same job again changes nothing and is told apart in ``numbers``.
        Raises ``QueueFull`` past the limits, ``JobCancelled`` when the submission was cancelled,
        ``InvalidInput`` for a block's number that no submission may have.

        While one call of a kind is under way, those that come meanwhile gather and go together:
        a busy gateway pays one round trip for many requests, an idle one never waits.
        """
        route = route or Route()
        if route.submission:
            return await self._enqueue_now(queue, jobs, route)
        kind = (str(queue), route)
        gathered = self._gathering.get(kind)
        if gathered is not None:
            waiting = _Waiting(jobs, asyncio.get_running_loop().create_future())
            gathered.append(waiting)
            return await waiting.told
        self._gathering[kind] = []
        try:
            return await self._enqueue_now(queue, jobs, route)
        finally:
            if self._gathering[kind]:
                task = asyncio.create_task(self._send_gathered(queue, route), name="enqueue")
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)
            else:
                del self._gathering[kind]

    async def _send_gathered(self, queue: keys.QueueName, route: Route) -> None:
        gathered = self._gathering[str(queue), route]
        while gathered:
            together = _first_of(gathered, route)
            del gathered[: len(together)]
            await self._enqueue_together(queue, together, route)
        del self._gathering[str(queue), route]

    async def _enqueue_together(
        self, queue: keys.QueueName, together: Sequence[_Waiting], route: Route
    ) -> None:
        """One call for several; each is told its own part, or what went wrong. Never raises."""
        together = [waiting for waiting in together if not waiting.told.done()]
        jobs = [job for waiting in together for job in waiting.jobs]
        if not jobs:
            return
        try:
            admitted = await self._enqueue_now(queue, jobs, route)
        except Exception as error:
            if isinstance(error, QueueFull) and len(together) > 1:
                for waiting in together:  # some of them may fit when all of them do not
                    await self._enqueue_together(queue, [waiting], route)
                return
            for waiting in together:
                waiting.refuse(error)
            return
        at = 0
        for waiting in together:
            waiting.admit(admitted, at)
            at += len(waiting.jobs)

    async def _enqueue_now(
        self, queue: keys.QueueName, jobs: Sequence[NewJob], route: Route
    ) -> Admitted:
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
            self._admission.max_shared_bytes,
            self._admission.max_unmerged_bytes,
            route.max_ahead,
            self._admission.max_dead_bytes,
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
            keys.outstanding(route.version_uid),
        ]
        with translated():
            verdict, tokens, size, *numbers = await self._enqueue(keys=names, args=arguments)
        self._check(verdict, tokens, size, queue, route)
        return Admitted(tuple(numbers))

    def _check(
        self, verdict: bytes, tokens: int, size: int, queue: keys.QueueName, route: Route
    ) -> None:
        if verdict == b"full":
            raise QueueFull(
                f"the {queue.lane} queue of this model holds {tokens} tokens in {size} bytes; "
                "try again later"
            )
        if verdict == b"shared_full":
            raise QueueFull(
                f"the {queue.lane} queues of all tenants of this model hold {size} bytes, and this "
                "one its share; try again later"
            )
        if verdict == b"merge_full":
            raise QueueFull(
                f"{size} bytes of vectors wait to be merged into this collection; try again later"
            )
        if verdict == b"dead_full":
            raise QueueFull(
                f"this tenant's documents in the dead letter have {size} bytes, its share: retry "
                "or drop entries before more is taken",
                retry_after_s=_DEAD_RETRY_S,
            )
        if verdict == b"late":
            raise QueueFull(
                f"{tokens} tokens wait before this call, more than the {route.max_ahead} that this "
                "model's workers do in the time that a call may wait; try again later"
            )
        if verdict == b"misnamed":
            raise InvalidInput(
                f"{str(queue)!r} is no name of a queue: it may have letters, digits, _, - and dots",
                field="queue",
            )
        if verdict == b"invalid":
            raise InvalidInput(
                "block, tokens and documents of a job must be whole numbers, and block below "
                f"{limits.MAX_BLOCKS}: begin another submission",
                field="block",
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
