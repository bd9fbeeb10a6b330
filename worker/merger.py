"""Applies what ``merge`` jobs bring: shards and deletions.

All that wait for one collection are applied together, in one segment and one commit, and only then
settled. A writer that dies in between leaves what is in the index and not settled: after its third
death a job is not merged again, but settled as what the manifest says of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vecfleet.common import keys
from vecfleet.common.document import check_document_id
from vecfleet.common.errors import (
    CorruptManifest,
    CorruptPayload,
    InvalidInput,
    JobFailed,
    StaleWriter,
    Unavailable,
    VecfleetError,
)
from vecfleet.common.limits import BLOCK_DOCUMENTS
from vecfleet.worker.collection_writers import CollectionWriters
from vecfleet.worker.job import ClaimedJob, Commit, Failure, Outcome, Release
from vecfleet.worker.partition import ApplyOutcome, PartitionWriter
from vecfleet.worker.shard import Shard, build_shard

log = logging.getLogger(__name__)

MAX_APPLY_BYTES = 64 << 20  # of one segment's shards; bounds the memory of one commit
# While shards keep coming, they are gathered: a commit costs about the same for one as for twenty.
COMMIT_EVERY_S = 0.1
# Before a collection that cannot be written is tried again. Its shards go back to Redis meanwhile,
# where they keep neither the window nor, as suspects, everything else from the other collections.
_FIRST_REST_S, _MOST_REST_S = 1.0, 8.0
_WORN = "its writer died or lost its lease too often, and the index does not hold it"


@dataclass(slots=True)
class _Waiting:
    """A merge job on its way into the next commit."""

    job: ClaimedJob
    done: asyncio.Future[Outcome]


class Merger:
    """The merge jobs in hand, by collection."""

    def __init__(self, writers: CollectionWriters, on_stale: Callable[[], None]) -> None:
        """``on_stale`` is called when a newer writer has taken over."""
        self._writers = writers
        self._on_stale = on_stale
        self._waiting: dict[str, list[_Waiting]] = {}
        self._drains: set[asyncio.Task[None]] = set()
        self._rests_s: dict[str, float] = {}  # by uid, of those that could not be written last
        self.discarded = 0  # shards of collections that were deleted

    async def merge(self, jobs: Sequence[ClaimedJob]) -> Sequence[Outcome]:
        """Apply the shards and deletions of ``jobs``; returns when they are durable."""
        loop = asyncio.get_running_loop()
        entries = [_Waiting(job, loop.create_future()) for job in jobs]
        for entry in entries:
            if entry.job.queue.task != "merge":
                # Of no collection: it would be handed back for ever.
                entry.done.set_result(Failure(InvalidInput("this queue takes no shards")))
                continue
            uid = entry.job.queue.target.rpartition("-")[0]
            first = uid not in self._waiting
            self._waiting.setdefault(uid, []).append(entry)
            if first:
                drain = loop.create_task(self._drain(uid), name=f"merge-{uid}")
                self._drains.add(drain)
                drain.add_done_callback(self._drains.discard)
        return [await entry.done for entry in entries]

    async def _drain(self, uid: str) -> None:
        """Apply what waits for one collection; what comes meanwhile makes the next commit."""
        loop = asyncio.get_running_loop()
        while batch := self._next_batch(uid):
            began = loop.time()
            outcomes = await self._applied_or_released(uid, [entry.job for entry in batch])
            for entry, outcome in zip(batch, outcomes, strict=True):
                if not entry.done.done():
                    entry.done.set_result(outcome)
            if len(batch) > 1:
                await asyncio.sleep(began + COMMIT_EVERY_S - loop.time())
        del self._waiting[uid]

    async def _applied_or_released(self, uid: str, jobs: Sequence[ClaimedJob]) -> list[Outcome]:
        """``_applied``; where not even the catalogue can be read, the jobs wait for better days."""
        try:
            return await self._applied(uid, jobs)
        except Exception:
            log.exception("cannot merge into %s", uid)
            return [Release(_MOST_REST_S) for _ in jobs]

    async def _applied(self, uid: str, jobs: Sequence[ClaimedJob]) -> list[Outcome]:
        """Apply ``jobs``; release them while the disk is full.

        An error that nobody foresaw is charged to the job that causes it alone.
        """
        try:
            outcomes = await self._writers.on_disk(lambda: self._apply(uid, jobs))
        except StaleWriter:
            # Nothing is settled: the jobs are released for whoever holds the index now.
            self._on_stale()
            await asyncio.Event().wait()
            raise
        except Unavailable as error:
            rest_s = min(2 * self._rests_s.get(uid, _FIRST_REST_S / 2), _MOST_REST_S)
            self._rests_s[uid] = rest_s
            log.error("cannot merge into %s, trying again in %g s: %s", uid, rest_s, error)
            return [Release(rest_s) for _ in jobs]
        except Exception as error:
            if await self._writers.on_disk(self._writers.are_stale):
                self._on_stale()  # whatever it was, it is no job's fault
                await asyncio.Event().wait()
            log.exception("cannot merge %d shards into %s", len(jobs), uid)
            if len(jobs) == 1:
                return [Failure(JobFailed(f"cannot be merged: {error}"))]
            return [outcome for job in jobs for outcome in await self._applied(uid, [job])]
        self._rests_s.pop(uid, None)
        return outcomes

    def _next_batch(self, uid: str) -> list[_Waiting]:
        waiting = self._waiting[uid]
        size = count = 0
        for entry in waiting:
            size += len(entry.job.payload) if isinstance(entry.job.payload, bytes) else 0
            if size > MAX_APPLY_BYTES and count:
                break
            count += 1
        batch, self._waiting[uid] = waiting[:count], waiting[count:]
        return batch

    def _apply(self, uid: str, jobs: Sequence[ClaimedJob]) -> list[Outcome]:
        writer = self._writers.opened(uid)
        if writer is None and not self._writers.was_deleted(uid):
            return [Release() for _ in jobs]  # claimed before the collection went out of service
        if writer is None:
            self.discarded += len(jobs)
            log.warning("discarded %d shards of a deleted collection", len(jobs))
            return [Commit(0, {"version": job.version, "documents": 0}) for job in jobs]
        shards: list[Shard] = []
        outcomes: dict[str, Outcome] = {}
        worn = [job for job in jobs if job.attempts > keys.MAX_ATTEMPTS]
        for job in jobs:
            if job in worn:
                continue
            try:
                shards.append(_shard_of(job, writer))
            except VecfleetError as error:
                outcomes[job.id] = Failure(error)
        try:
            report = writer.apply(shards) if shards else ()
            held = writer.applied([job.id for job in worn]) if worn else set()
        except CorruptManifest as error:
            self._writers.retire(uid, error)
            return [Release() for _ in jobs]
        for applied in report:
            outcomes[applied.shard_id] = _outcome(applied, jobs)
        for job in worn:
            outcomes[job.id] = _committed(job) if job.id in held else Failure(JobFailed(_WORN))
        return [outcomes[job.id] for job in jobs]


def _shard_of(job: ClaimedJob, writer: PartitionWriter) -> Shard:
    """The shard that a merge job carries, or that its deletions come to."""
    if isinstance(job.payload, bytes):
        shard = Shard.parse(job.payload)
        if shard.shard_id != job.id:
            raise CorruptPayload(f"job {job.id} carries the shard of {shard.shard_id}")
        shard.check_pages()
        return shard
    if not isinstance(job.payload, dict) or not isinstance(job.payload.get("delete"), list):
        raise CorruptPayload("a merge job's payload is a shard or a map with 'delete'")
    ids = job.payload["delete"]
    if not 0 < len(ids) <= BLOCK_DOCUMENTS:
        raise InvalidInput(f"delete takes 1 to {BLOCK_DOCUMENTS} ids", field="delete")
    for document_id in ids:
        check_document_id(document_id)
    version = job.version or job.payload.get("version")
    if type(version) is not int or not 0 < version < 2**63:
        raise InvalidInput("version must be a positive whole number", field="version")
    spec = writer.state.spec
    return Shard.parse(
        build_shard(job.id, spec.space, spec.dimension, deleted_ids=ids, deleted_versions=version)
    )


def _outcome(applied: ApplyOutcome, jobs: Sequence[ClaimedJob]) -> Outcome:
    job = next(job for job in jobs if job.id == applied.shard_id)
    if applied.error is not None:
        return Failure(applied.error)
    return _committed(job)


def _committed(job: ClaimedJob) -> Commit:
    return Commit(job.documents, {"version": job.version, "documents": job.documents})
