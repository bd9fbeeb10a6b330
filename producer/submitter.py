"""One submission from its first document to its last answer.

reader (a thread) ──blocks──► prepare ──new ones──► send ──► Redis
│                                │                             │
│         journal, bits: done ───┤                  replies, looks into Redis
│         search process: same ──┘                             ▼
└──────── rejects ───────────────────────────────► settle: counts, journal
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vecfleet.common.collection import Collection
from vecfleet.common.errors import Conflict, JobCancelled, VecfleetError
from vecfleet.common.fleet_client import FleetClient, block_job_id
from vecfleet.producer.block_states import Bits, BlockStates
from vecfleet.producer.cutting import CutBlock
from vecfleet.producer.in_flight import InFlight, Sent
from vecfleet.producer.items import Rejected
from vecfleet.producer.journal import Journal
from vecfleet.producer.options import SubmitOptions
from vecfleet.producer.patience import Patience
from vecfleet.producer.pulling import Pulled, Puller
from vecfleet.producer.result import Progress, SubmissionResult
from vecfleet.producer.sending import Sender
from vecfleet.producer.settling import Settling
from vecfleet.producer.unchanged import UnchangedFilter, unchanged_filter
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
        self._filter: UnchangedFilter | None = None
        self._bits = Bits()
        self._first_block = ""
        self._content = hashlib.blake2b(digest_size=16)
        self._started = time.monotonic()
        self._last_version = task.journal.last_version() if task.journal else None

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
                raise Conflict(_other_input(known.id), field="submission")
            self._bits = await self._states.bits()
        if self._task.options.only_changed:
            self._filter = await unchanged_filter(self._fleet, self._collection)

    async def _reopen(self) -> None:
        await self._fleet.submissions.open(
            self._task.submission,
            tenant=self._collection.tenant,
            collection=self._collection.name,
            uid=self._collection.uid,
            first_block=self._first_block,
        )

    async def _close(self) -> None:
        content = self._content.hexdigest() if self._first_block else ""
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
            raise Conflict(_other_input(known.id), field="submission")
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
                    await ready.put(await self._select(pulled.blocks))
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

    async def _select(self, blocks: Sequence[CutBlock]) -> list[Sent]:
        """What of ``blocks`` must be sent, in their order; the rest is booked."""
        chosen: dict[int, Sent] = {}
        fresh: list[CutBlock] = []
        for cut in blocks:
            self._content.update(cut.digest.encode())
            if self._is_settled(cut):
                continue
            record = self._task.journal.blocks.get(cut.place) if self._task.journal else None
            if record is not None:
                # Sent by an earlier run: the same block again, whatever has changed since.
                chosen[cut.place] = Sent(cut, earlier=record)
                self._note_sent(cut)
            else:
                fresh.append(cut)
        kept = fresh if self._filter is None or not fresh else await self._filter.changed(fresh)
        for cut, left in zip(fresh, kept, strict=True):
            if len(left):
                chosen[cut.place] = Sent(left, unchanged=len(cut) - len(left))
            else:
                self._settling.note_same(cut)
        if self._last_version is not None:
            for sent in chosen.values():
                self._keep_version(sent, self._last_version)
        return [chosen[place] for place in sorted(chosen)]

    def _is_settled(self, cut: CutBlock) -> bool:
        """Whether an earlier run settled the block; then it is booked."""
        journal = self._task.journal
        record = journal.blocks.get(cut.place) if journal is not None else None
        if record is not None and record.digest != cut.digest:
            raise Conflict(_other_input(self._task.submission), field="submission")
        if record is not None and record.is_settled:
            self._settling.note_earlier(cut, record)
            self._note_sent(cut)
            return True
        fate = self._bits.fate(cut.place)
        if fate == "waiting":
            return False
        sent = Sent(cut, earlier=record)
        if record is not None:
            sent.documents, sent.unchanged = record.documents, record.unchanged
        self._settling.note_bit(sent, committed=fate == "committed")
        self._note_sent(cut)
        return True

    def _note_sent(self, cut: CutBlock) -> None:
        if self._filter is not None:
            self._filter.note_sent(cut)

    def _keep_version(self, sent: Sent, last: tuple[int, int]) -> None:
        """Give a block the version that it had, or would have had, in the interrupted run.

        So what others wrote since then stays the newer. Later blocks still win over earlier ones.
        """
        if self._collection.spec.versions != "assigned":
            return
        place, version = last
        known = sent.earlier.version if sent.earlier is not None else 0
        sent.version = known or max(1, version + sent.cut.place - place)
        sent.cut.set_version(sent.version)

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


def _other_input(submission: str) -> str:
    return (
        f"submission {submission} was begun with other documents; "
        "leave it out, or name another one: what stands in the collection already is not "
        "embedded again"
    )
