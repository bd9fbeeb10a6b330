"""Putting blocks into Redis, in their order, as fast as the window and the queue let them in."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Any

from vecfleet.common.block_job import block_job_id
from vecfleet.common.collection import Collection
from vecfleet.common.errors import JobFailed, QueueFull, RedisUnavailable
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.queue_client import ALREADY_COMMITTED, ALREADY_QUEUED, ALREADY_REFUSED
from vecfleet.producer.in_flight import InFlight, Sent
from vecfleet.producer.options import SubmitOptions
from vecfleet.producer.patience import Patience
from vecfleet.producer.pulling import MOST_BLOCKS
from vecfleet.producer.settling import DEAD_LETTER, Settling

LOOK_AGAIN_S = 10.0  # an answer this late may be lost


class Sender:
    """Enqueues blocks of one submission; the same block again changes nothing."""

    def __init__(
        self,
        fleet: FleetClient,
        collection: Collection,
        submission: str,
        *,
        in_flight: InFlight,
        settling: Settling,
        options: SubmitOptions,
        stop: asyncio.Event,
        redis_patience: Patience,
        queue_patience: Patience,
    ) -> None:
        self._fleet = fleet
        self._collection = collection
        self._submission = submission
        self._in_flight = in_flight
        self._settling = settling
        self._options = options
        self._stop = stop
        self._redis_patience = redis_patience
        self._queue_patience = queue_patience
        self._most = MOST_BLOCKS  # blocks in one call

    async def send(self, blocks: Sequence[Sent]) -> None:
        """Enqueue ``blocks``, or as many as there is time for before the stop.

        Raises ``QueueFull`` or ``RedisUnavailable`` when patience is at its end.
        """
        left = deque(blocks)
        while left:
            await self._or_stop(self._in_flight.wait_for_room())
            if self._stop.is_set():
                return
            group: list[Sent] = []
            while left and len(group) < self._most and self._in_flight.has_room():
                group.append(left.popleft())
                self._in_flight.add(group[-1])
            await self._admit(group)

    async def resend(self, sent: Sent) -> None:
        """Enqueue a block again whose job Redis has lost; one try."""
        sent.is_sending = True
        self._expect(sent)
        try:
            await self._enqueue([sent])
        finally:
            sent.is_sending = False

    async def _admit(self, group: Sequence[Sent]) -> None:
        for sent in group:
            self._expect(sent)
        progress_at = self._settling.progress_at
        while True:
            try:
                await self._enqueue(group)
                break
            except QueueFull as error:
                if len(group) > 1:
                    # Where a large call does not fit, a small one may; and others need room too.
                    self._most = 1
                    for sent in group:
                        await self._admit([sent])
                    return
                if self._settling.progress_at > progress_at:
                    progress_at = self._settling.progress_at
                    self._queue_patience.ok()
                pause_s = self._queue_patience.failed(error)
            except RedisUnavailable as error:
                pause_s = self._redis_patience.failed(error)
            await self._or_stop(asyncio.sleep(pause_s))
            if self._stop.is_set():
                self._give_up(group)
                return
        self._most = min(2 * self._most, MOST_BLOCKS)
        self._queue_patience.ok()
        self._redis_patience.ok()

    async def _enqueue(self, group: Sequence[Sent]) -> None:
        admitted = await self._fleet.enqueue_blocks(
            self._collection,
            [sent.cut.block for sent in group],
            submission=self._submission,
            places=[sent.cut.place for sent in group],
            truncate=self._options.truncate,
            answered=True,
        )
        for sent, number in zip(group, admitted.numbers, strict=True):
            self._note(sent, number)

    def _note(self, sent: Sent, number: int) -> None:
        """What the enqueue said of one block."""
        sent.is_sending = False
        if number in (ALREADY_QUEUED, ALREADY_COMMITTED, ALREADY_REFUSED):
            if sent.earlier is not None:
                sent.documents = sent.earlier.documents
                sent.unchanged = sent.earlier.unchanged
        elif number > 0:
            sent.version = number
        if self._in_flight.get(sent.cut.place) is not sent:
            return  # its reply was faster
        self._settling.note_sent(sent)
        now = asyncio.get_running_loop().time()
        if number == ALREADY_COMMITTED:
            self._settling.settle(sent, committed=sent.documents)
        elif number == ALREADY_REFUSED:
            self._settling.fail(sent, JobFailed(DEAD_LETTER))
        else:
            # Whoever queued it before may have been another run, whose box gets the answer.
            sent.is_doubtful = number == ALREADY_QUEUED
            sent.look_at = now if sent.is_doubtful else now + LOOK_AGAIN_S

    def _expect(self, sent: Sent) -> None:
        reply = self._fleet.box.expect(block_job_id(self._submission, sent.cut.place))
        reply.add_done_callback(partial(self._settling.on_reply, sent))

    def _give_up(self, group: Sequence[Sent]) -> None:
        for sent in group:
            if self._in_flight.pop(sent.cut.place) is not None:
                self._fleet.box.forget(block_job_id(self._submission, sent.cut.place))

    async def _or_stop(self, waiting: Awaitable[Any]) -> None:
        """Wait for one of the two."""
        tasks = [asyncio.ensure_future(waiting), asyncio.ensure_future(self._stop.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
