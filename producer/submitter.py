"""One submission from its first document to its last answer.

reader (a thread) ──blocks──► prepare ──new ones──► send ──► Redis
│                                │                             │
│         journal, bits: done ───┤                  replies, looks into Redis
│         search process: same ──┘                             ▼
└──────── rejects ───────────────────────────────► settle: counts, journal
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vecfleet.common.block_job import block_job_id
from vecfleet.common.collection import Collection
from vecfleet.common.errors import JobCancelled, VecfleetError
from vecfleet.common.fleet_client import FleetClient
from vecfleet.producer.block_states import BlockStates
from vecfleet.producer.in_flight import InFlight, Sent
from vecfleet.producer.items import Rejected
from vecfleet.producer.journal import Journal
from vecfleet.producer.options import SubmitOptions
from vecfleet.producer.patience import Patience
from vecfleet.producer.pulling import Pulled, Puller
from vecfleet.producer.result import Progress, SubmissionResult
from vecfleet.producer.selecting import Selector, other_input
from vecfleet.producer.sending import Sender
from vecfleet.producer.settling import Settling
from vecfleet.producer.unchanged import unchanged_filter
from vecfleet.producer.watching import Watcher

_REPORT_S = 0.2
_READY_BATCHES = 2
_T = TypeVar("_T")
_Ready = asyncio.Queue[list[Sent] | Exception | None]


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be submitted, and whom to tell."""

    submission: str
    is_continued: bool  # its id was given: an earlier run may have sent a part
    options: SubmitOptions
    journal: Journal | None
    stop: asyncio.Event  # set: send nothing more, wait for what is in flight
    on_progress: Callable[[Progress], None]
    on_reject: Callable[[Rejected], None]


class Submitter:
    """Runs one submission, once."""

    def __init__(
        self, fleet: FleetClient, collection: Collection, puller: Puller, task: Task
    ) -> None:
        self._fleet = fleet
        self._collection = collection
        self._puller = puller
        self._task = task
        self._states = BlockStates(fleet.redis, task.submission)
        self._in_flight = InFlight(task.options.max_blocks, task.options.max_bytes)
        self._settling = Settling(self._in_flight, self._states, task.journal, task.on_reject)
        self._queue_patience = Patience(task.options.patience_s)
        self._redis_patience = Patience(task.options.patience_s)
        self._sender = Sender(
            fleet,
            collection,
            task.submission,
            in_flight=self._in_flight,
            settling=self._settling,
            options=task.options,
            stop=task.stop,
            redis_patience=self._redis_patience,
            queue_patience=self._queue_patience,
        )
        self._watcher = Watcher(
            fleet,
            collection,
            in_flight=self._in_flight,
            states=self._states,
            settling=self._settling,
            sender=self._sender,
            patience=self._redis_patience,
            reopen=self._reopen,
        )
        self._selector = Selector(
            collection, task.submission, settling=self._settling, journal=task.journal
        )
        self._first_block = ""
        self._started = time.monotonic()

    async def run(self) -> SubmissionResult:
        """Submit everything.

        Raises what stopped it: the input's own errors, ``QueueFull`` or ``RedisUnavailable`` past
        the patience, ``Conflict`` where the submission was for other input, ``JobCancelled``,
        ``UnknownCollection``.
        """
        first = await self._or_stop(self._puller.pull())
        if first is not None:
            await self._open(first)
            guards = [self._watcher.run(), self._report(), self._sync()]
            try:
                await _guarded(self._work(first), guards)
            finally:
                self._forget()
                if self._task.journal is not None:
                    await asyncio.to_thread(self._task.journal.sync)
                self._task.on_progress(self.progress())
        tally = self._settling.tally
        return SubmissionResult(
            submission=self._task.submission,
            collection=self._collection.name,
            documents=tally.documents,
            committed=tally.committed,
            unchanged=tally.unchanged,
            rejected=tally.rejected,
            failed=tally.failed,
            seconds=time.monotonic() - self._started,
            interrupted=self._task.stop.is_set(),
        )

    def progress(self) -> Progress:
        """How far it is."""
        tally = self._settling.tally
        return Progress(
            submission=self._task.submission,
            settled=tally.documents,
            committed=tally.committed,
            unchanged=tally.unchanged,
            rejected=tally.rejected,
            failed=tally.failed,
            in_flight=self._in_flight.documents,
            seconds=time.monotonic() - self._started,
            waiting=self._redis_patience.trouble
            or self._queue_patience.trouble
            or self._watcher.hint,
        )

    def _forget(self) -> None:
        """Expect no more replies: those of what is still in flight are for the next run."""
        for sent in self._in_flight:
            self._fleet.box.forget(block_job_id(self._task.submission, sent.cut.place))

    # Opening and closing

    async def _open(self, first: Pulled) -> None:
        if first.blocks:
            self._first_block = first.blocks[0].digest
        await self._reopen()
        if self._task.is_continued:
            known = await self._fleet.submissions.get(self._task.submission)
            if known.state == "cancelled":
                raise JobCancelled(f"submission {known.id} was cancelled; use another one")
            same_input = known.first_block in ("", self._first_block)
            if known.uid != self._collection.uid or not same_input:
                raise other_input(known.id)
            self._selector.bits = await self._states.bits()
        if self._task.options.only_changed:
            self._selector.filter = await unchanged_filter(self._fleet, self._collection)

    async def _reopen(self) -> None:
        await self._fleet.submissions.open(
            self._task.submission,
            tenant=self._collection.tenant,
            collection=self._collection.name,
            uid=self._collection.uid,
            first_block=self._first_block,
        )

    async def _close(self) -> None:
        content = self._selector.content if self._first_block else ""
        tally = self._settling.tally
        await self._fleet.submissions.close(
            self._task.submission,
            blocks=await self._states.settled(),
            documents=tally.committed + tally.failed,
            content=content,
        )
        if not (self._task.is_continued or self._settling.is_uncertain):
            return
        known = await self._fleet.submissions.get(self._task.submission)
        if content and known.content not in ("", content):
            raise other_input(known.id)
        if self._settling.is_uncertain and known.failed > tally.failed:
            more = min(known.failed - tally.failed, tally.committed)
            tally.committed -= more
            tally.failed += more

    # The work

    async def _work(self, first: Pulled) -> None:
        ready: _Ready = asyncio.Queue(_READY_BATCHES)
        prepare = asyncio.create_task(self._prepare(first, ready))
        failure: Exception | None = None
        try:
            while not self._task.stop.is_set():
                batch = await self._or_stop(ready.get())
                if not isinstance(batch, list):
                    failure = batch
                    break
                await self._sender.send(batch)
        finally:
            prepare.cancel()
            await asyncio.gather(prepare, return_exceptions=True)
        await self._in_flight.wait_until_empty()
        await self._retry(self._settling.tell_failures)
        await self._retry(self._watcher.check_collection)
        if failure is not None:
            raise failure
        if not self._task.stop.is_set():
            await self._retry(self._close)
            await self._retry(lambda: self._settling.tell_failures(at_end=True))

    async def _retry(self, call: Callable[[], Awaitable[None]]) -> None:
        """Make a call that may be made twice, also while Redis is away for a moment."""
        while True:
            try:
                return await call()
            except VecfleetError as error:
                if not error.retryable:
                    raise
                await asyncio.sleep(self._redis_patience.failed(error))

    async def _prepare(self, first: Pulled, ready: _Ready) -> None:
        """Read ahead; what must be sent goes to ``ready``, then None, or what failed."""
        pulled = first
        following: asyncio.Task[Pulled] | None = None
        try:
            while True:
                self._settling.reject(pulled.rejects)
                if not pulled.is_end:
                    following = asyncio.create_task(self._puller.pull())
                if pulled.blocks:
                    await ready.put(await self._selector.select(pulled.blocks))
                if following is None:
                    break
                pulled, following = await following, None
        except Exception as error:
            await ready.put(error)
        else:
            await ready.put(None)
        finally:
            if following is not None:
                following.cancel()

    # Beside the work

    async def _report(self) -> None:
        while True:
            self._task.on_progress(self.progress())
            await asyncio.sleep(_REPORT_S)

    async def _sync(self) -> None:
        """Make settled blocks durable, many with one call."""
        journal = self._task.journal
        while journal is not None:
            await self._settling.dirty.wait()
            self._settling.dirty.clear()
            await asyncio.to_thread(journal.sync)

    async def _or_stop(self, waiting: Coroutine[Any, Any, _T]) -> _T | None:
        """The result of ``waiting``; None when the stop came first."""
        task = asyncio.create_task(waiting)
        stop = asyncio.create_task(self._task.stop.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            stop.cancel()


async def _guarded(
    work: Coroutine[Any, Any, None], guards: Sequence[Coroutine[Any, Any, None]]
) -> None:
    """Run ``work``; when a guard fails, the work ends with the guard's error."""
    main = asyncio.create_task(work)
    beside = [asyncio.create_task(guard) for guard in guards]
    try:
        pending = {main, *beside}
        while not main.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in (main, *beside):
            task.cancel()
        await asyncio.gather(main, *beside, return_exceptions=True)
