"""The way of a call to a worker and back: jobs into a queue, their answers out of the reply box."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from vecfleet.common import codec, keys, limits
from vecfleet.common.directory import Directory
from vecfleet.common.errors import EngineFailed, QueueFull, TextsTooLong, VecfleetError
from vecfleet.common.names import new_id
from vecfleet.common.queue_client import Admitted, NewJob, QueueClient, Route
from vecfleet.common.reply_box import ReplyBox

_RETRY_AFTER_RANGE_S = (1.0, 60.0)


@dataclass(frozen=True, slots=True)
class Call:
    """One function of a worker, called."""

    queue: keys.QueueName
    function: str
    payload: dict[str, Any]
    tokens: int
    first: int = 0  # place of its first text in what was asked


class RoundTrips:
    """Calls that wait for their answers."""

    def __init__(
        self,
        queues: QueueClient,
        directory: Directory,
        box: ReplyBox,
        *,
        timeout_s: float,
        max_wait_s: float,
    ) -> None:
        """``timeout_s`` ends a call's waiting; ``max_wait_s`` is how long one may have to wait for
        those before it in the interactive lane, as far as is known.
        """
        self._queues = queues
        self._directory = directory
        self._box = box
        self._timeout_s = timeout_s
        self._max_wait_s = max_wait_s

    async def enqueue(
        self, queue: keys.QueueName, jobs: Sequence[NewJob], route: Route
    ) -> Admitted:
        """Put jobs into a queue; ``QueueFull`` says when there may be room."""
        async with self._told_when(queue):
            return await self._queues.enqueue(queue, jobs, route)

    async def check_room(
        self, queue: keys.QueueName, merge_queue: keys.QueueName, tokens: int
    ) -> None:
        """Raise ``QueueFull`` where documents of so many tokens would be refused, at a glance."""
        async with self._told_when(queue):
            await self._queues.check_room(queue, merge_queue, tokens)

    @asynccontextmanager
    async def _told_when(self, queue: keys.QueueName) -> AsyncIterator[None]:
        try:
            yield
        except QueueFull as error:
            if error.retry_after_s is None:
                error.retry_after_s = await self._retry_after_s(queue)
            raise

    async def _retry_after_s(self, queue: keys.QueueName) -> float:
        waiting = await self._directory.tokens_ahead(queue)
        rate = await self._directory.tokens_per_s(queue.pool)
        low, high = _RETRY_AFTER_RANGE_S
        return min(high, max(low, math.ceil(waiting / rate))) if rate > 0 else low

    def _max_ahead(self, queue: keys.QueueName, timeout_s: float) -> int:
        """Tokens that a call may wait for: past that it is told at once to come again.

        Where nobody knows yet what the workers can do, it is what one holds at most.
        """
        if queue.task not in ("embed", "rerank"):
            return 0
        rate = self._directory.known_rate(queue)
        wait_s = min(timeout_s, self._max_wait_s) if queue.lane == "interactive" else timeout_s
        return max(1, int(rate * wait_s)) if rate > 0 else limits.WINDOW_TOKENS

    async def ask(self, calls: Sequence[Call], timeout_s: float | None) -> list[dict[str, Any]]:
        """The answers to calls of one queue; raises ``DeadlineExceeded``, and what one ended with.

        Whatever ends the waiting, the jobs are cancelled.
        """
        timeout = self._timeout_s if timeout_s is None else timeout_s
        jobs = [
            NewJob(new_id(), codec.pack_call(call.function, call.payload), call.tokens)
            for call in calls
        ]
        futures = [self._box.expect(job.id) for job in jobs]
        queue = calls[0].queue
        route = Route(
            box=self._box.name,
            deadline_ms=int(timeout * 1000),
            max_ahead=self._max_ahead(queue, timeout),
        )
        try:
            await self.enqueue(queue, jobs, route)
            return list(
                await asyncio.gather(
                    *(
                        self._answer(call, job, future, timeout)
                        for call, job, future in zip(calls, jobs, futures, strict=True)
                    )
                )
            )
        except QueueFull:  # none of them is there
            self._forget(jobs, futures)
            raise
        except (VecfleetError, asyncio.CancelledError):
            self._forget(jobs, futures)
            await self._cancel(jobs)
            raise

    async def _answer(
        self, call: Call, job: NewJob, future: asyncio.Future[Any], timeout_s: float
    ) -> dict[str, Any]:
        try:
            body: dict[str, Any] = await self._box.wait(job.id, future, timeout_s)
            return body
        except (TextsTooLong, EngineFailed) as error:
            raise error.moved(call.first) from error

    def _forget(self, jobs: Sequence[NewJob], futures: Sequence[asyncio.Future[Any]]) -> None:
        """Nobody here waits any more."""
        for job, future in zip(jobs, futures, strict=True):
            self._box.forget(job.id)
            future.cancel()

    async def _cancel(self, jobs: Sequence[NewJob]) -> None:
        """Free what the jobs hold in Redis."""
        try:
            await asyncio.shield(self._queues.cancel(job.id for job in jobs))
        except VecfleetError:
            return  # Redis is away; the jobs' deadline drops them


def parts_of(texts: Sequence[str]) -> list[tuple[int, Sequence[str]]]:
    """Parts of the texts, each with the place of its first one."""
    size = limits.BLOCK_DOCUMENTS
    return [(start, texts[start : start + size]) for start in range(0, len(texts), size)]


def cost_of(texts: Sequence[str]) -> int:
    """Tokens that texts come to, roughly."""
    size = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    return limits.estimate_tokens(size, len(texts))
