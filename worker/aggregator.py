"""The aggregator: the writers of all collections of one home, and the two jobs they do.

``merge`` jobs bring shards and deletions; all that wait for one collection are applied together,
in one segment and one commit, and only then settled. ``create`` and ``delete`` keep the catalogue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import redis

from vecfleet.common import codec, keys
from vecfleet.common.collection import Collection, CollectionSpec
from vecfleet.common.document import check_document_id
from vecfleet.common.errors import (
    CorruptManifest,
    CorruptPayload,
    InvalidInput,
    JobFailed,
    QueueFull,
    SpaceMismatch,
    StaleWriter,
    Unavailable,
    UnknownCollection,
    VecfleetError,
)
from vecfleet.common.limits import BLOCK_DOCUMENTS
from vecfleet.common.redis_client import read_lua, translated
from vecfleet.worker.catalog import Catalog, partition_spec
from vecfleet.worker.job import Answer, ClaimedJob, Commit, Failure, Outcome, Release
from vecfleet.worker.partition import ApplyOutcome, PartitionWriter
from vecfleet.worker.shard import Shard, build_shard

log = logging.getLogger(__name__)

MAX_APPLY_BYTES = 64 << 20  # of one segment's shards; bounds the memory of one commit
# While shards keep coming, they are gathered: a commit costs about the same for one as for twenty.
COMMIT_EVERY_S = 0.1
# Before a collection that cannot be written is tried again. Its shards go back to Redis meanwhile,
# where they keep neither the window nor, as suspects, everything else from the other collections.
_FIRST_REST_S, _MOST_REST_S = 1.0, 8.0
_MAINTAIN_S = 0.5
_WATERMARK_S = 10.0
_WATERMARK_MEMBERS = 10_000
RESUMABLE_S = 30 * 24 * 3600  # how old versions may be that a resumed producer still brings
_Result = TypeVar("_Result")


@dataclass(slots=True)
class _Waiting:
    """A merge job on its way into the next commit."""

    job: ClaimedJob
    done: asyncio.Future[Outcome]


class Aggregator:
    """Owns the catalogue and one writer a collection; all of its disk work is in one thread."""

    def __init__(
        self,
        catalog: Catalog,
        client: redis.Redis,
        token: int,
        *,
        on_stale: Callable[[], None],
    ) -> None:
        """``token`` fences the writers; ``on_stale`` is called when a newer one has taken over."""
        self._catalog = catalog
        self._redis = client
        self._token = token
        self._on_stale = on_stale
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._writers: dict[str, PartitionWriter] = {}
        self._waiting: dict[str, list[_Waiting]] = {}
        self._collections: dict[str, Collection] = {}
        self._watermark = client.register_script(read_lua(Path(__file__).parent, "watermark"))
        self._watermark_at: dict[str, float] = {}  # when each is due, by uid
        self._drains: set[asyncio.Task[None]] = set()
        self._out_of_service: set[str] = set()  # uids whose manifest cannot be read
        self._rests_s: dict[str, float] = {}  # by uid, of those that could not be written last
        self._deleted: dict[str, str] = {}  # the tenants, by uid
        self._tenants: frozenset[str] = frozenset()  # that have or had a collection
        self.discarded = 0  # shards of collections that were deleted

    def open(self) -> None:
        """Open every collection's writer and publish the catalogue."""
        for collection in self._catalog.list():
            try:
                self._adopt(collection)
            except Unavailable as error:
                self._collections[collection.uid] = collection
                log.error("cannot open %s, trying again with its shards: %s", collection.uid, error)
            except (CorruptManifest, SpaceMismatch) as error:
                self._collections[collection.uid] = collection
                self._retire(collection.uid, error)
        # What is still on its way to a deleted collection is claimed and discarded.
        self._deleted = self._catalog.deleted(time.time() - keys.SUBMISSION_TTL_S)
        self._tenants = self._catalog.tenants()
        try:
            self._publish()
        except QueueFull as error:
            log.warning("the catalogue is published later: %s", error)

    def close(self) -> None:
        """Close the writers; call it when no job runs."""
        self._disk.shutdown()
        for writer in self._writers.values():
            writer.close()
        self._catalog.close()

    def queues(self) -> list[keys.QueueName]:
        """The merge queue of every collection, and the catalogue's own."""
        return [
            keys.catalog_queue(self._catalog.home, keys.EVERY_TENANT),
            *(
                collection.merge_queue
                for collection in list(self._collections.values())
                if collection.uid not in self._out_of_service
            ),
            *(keys.merge_queue(uid, tenant) for uid, tenant in self._deleted.items()),
        ]

    def publish(self) -> None:
        """Make Redis's copy of the catalogue true again, whatever happened to it; waits for it."""
        # In the thread that creates and deletes: a copy of an older state must not come last.
        self._disk.submit(self._publish).result()

    def _publish(self) -> None:
        self._catalog.check_writer()  # one who went on after a freeze knows an older state
        # Also of tenants whose last collection was deleted: its record has to go.
        by_tenant: dict[str, dict[str, bytes]] = {tenant: {} for tenant in self._tenants}
        for collection in list(self._collections.values()):
            if self._catalog.by_uid(collection.uid) is not None:
                record = codec.dumps(collection.to_wire())
                by_tenant[collection.tenant][collection.name] = record
        with translated():
            for tenant, records in by_tenant.items():
                key = keys.collections(tenant)
                stale = self._stale(key, records)
                pipe = self._redis.pipeline(transaction=True)
                if stale:
                    pipe.hdel(key, *stale)
                if records:
                    pipe.hset(key, mapping=records)  # type: ignore[arg-type]
                pipe.execute()
            self._redis.set(keys.PUBLISHED, int(time.time()))

    def _stale(self, key: str, records: Mapping[str, bytes]) -> list[bytes]:
        """The names in Redis's copy that must go: this home's that are gone, and unreadable ones.

        What another home would have there it writes again.
        """
        raw: Any = self._redis.hgetall(key)
        return [
            name
            for name, record in raw.items()
            if name.decode(errors="replace") not in records and self._is_stale_record(record)
        ]

    def _is_stale_record(self, record: bytes) -> bool:
        try:
            return Collection.from_wire(codec.loads(record)).home == self._catalog.home
        except CorruptPayload:
            return True

    async def maintain(self) -> None:
        """Keep segments few and indexes built, for ever; children do the work."""
        while True:
            for uid, writer in list(self._writers.items()):
                try:
                    await self.on_disk(lambda: self._maintain(uid, writer))  # noqa: B023
                except StaleWriter:
                    self._on_stale()
                    return
                except Exception:
                    log.exception("maintenance of %s failed; it is tried again", uid)
            await self.on_disk(self._remove_deleted)
            await asyncio.sleep(_MAINTAIN_S)

    async def on_disk(self, work: Callable[[], _Result]) -> _Result:
        """Run ``work`` in the one thread that writes."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)

    def _maintain(self, uid: str, writer: PartitionWriter) -> None:
        if self._writers.get(uid) is not writer:
            return  # deleted meanwhile
        now = time.monotonic()
        watermark = None
        if now >= self._watermark_at.get(uid, 0.0):
            self._watermark_at[uid] = now + _WATERMARK_S
            watermark = self._watermark_of(uid)
        try:
            report = writer.maintain(watermark=watermark)
        except CorruptManifest as error:
            self._retire(uid, error)
            return
        for failure in report.failed:
            log.warning("maintenance of %s failed, tried again later: %s", uid, failure)

    def _watermark_of(self, uid: str) -> int | None:
        """Below this version nothing can arrive any more; None where callers give the versions."""
        if self._collections[uid].spec.versions != "assigned":
            return None
        names = [keys.outstanding(uid), keys.version(uid)]
        with translated():
            lowest = int(self._watermark(keys=names, args=[_WATERMARK_MEMBERS]))
            now_s, _ = cast(Any, self._redis.time())  # versions are drawn from Redis's clock
        # A producer that resumes brings old versions; what is in the dead letter is outstanding.
        resumable = (now_s - RESUMABLE_S) * 1_000_000
        return min(lowest, resumable) or None

    # merge

    async def merge(self, jobs: Sequence[ClaimedJob]) -> Sequence[Outcome]:
        """Apply the shards and deletions of ``jobs``; returns when they are durable."""
        loop = asyncio.get_running_loop()
        entries = [_Waiting(job, loop.create_future()) for job in jobs]
        for entry in entries:
            if (
                entry.job.queue.task != "merge"
            ):  # of no collection: it would be handed back for ever
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
            outcomes = await self._applied(uid, [entry.job for entry in batch])
            for entry, outcome in zip(batch, outcomes, strict=True):
                if not entry.done.done():
                    entry.done.set_result(outcome)
            if len(batch) > 1:
                await asyncio.sleep(began + COMMIT_EVERY_S - loop.time())
        del self._waiting[uid]

    async def _applied(self, uid: str, jobs: Sequence[ClaimedJob]) -> list[Outcome]:
        """Apply ``jobs``; release them while the disk is full.

        An error that nobody foresaw is charged to the job that causes it alone.
        """
        try:
            outcomes = await self.on_disk(lambda: self._apply(uid, jobs))
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
            if await self.on_disk(self._is_stale):
                self._on_stale()  # whatever it was, it is no job's fault
                await asyncio.Event().wait()
            log.exception("cannot merge %d shards into %s", len(jobs), uid)
            if len(jobs) == 1:
                return [Failure(JobFailed(f"cannot be merged: {error}"))]
            return [outcome for job in jobs for outcome in await self._applied(uid, [job])]
        self._rests_s.pop(uid, None)
        return outcomes

    def _is_stale(self) -> bool:
        try:
            self._catalog.check_writer()
        except StaleWriter:
            return True
        return False

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
        writer = self._writers.get(uid) or self._opened_late(uid)
        if writer is None and not self._catalog.was_deleted(uid):
            return [Release() for _ in jobs]  # claimed before the collection went out of service
        if writer is None:
            self.discarded += len(jobs)
            log.warning("discarded %d shards of a deleted collection", len(jobs))
            return [Commit(0, {"version": job.version, "documents": 0}) for job in jobs]
        shards: list[Shard] = []
        outcomes: dict[str, Outcome] = {}
        for job in jobs:
            try:
                shards.append(_shard_of(job, writer))
            except VecfleetError as error:
                outcomes[job.id] = Failure(error)
        try:
            report = writer.apply(shards) if shards else ()
        except CorruptManifest as error:
            self._retire(uid, error)
            return [Release() for _ in jobs]
        for applied in report:
            outcomes[applied.shard_id] = _outcome(applied, jobs)
        return [outcomes[job.id] for job in jobs]

    def _opened_late(self, uid: str) -> PartitionWriter | None:
        """The writer of a collection that could not be opened when it was tried last."""
        collection = self._collections.get(uid)
        if collection is None or uid in self._out_of_service:
            return None
        try:
            self._adopt(collection)
        except (CorruptManifest, SpaceMismatch) as error:
            self._retire(uid, error)
        return self._writers.get(uid)

    def _retire(self, uid: str, error: VecfleetError) -> None:
        """Take a collection out of service: its files stay as they are, its shards in Redis."""
        self._out_of_service.add(uid)
        if writer := self._writers.pop(uid, None):
            writer.close()
        log.error("collection %s is out of service: %s", self._collections[uid].name, error)

    # catalogue

    async def create(self, job: ClaimedJob) -> Answer:
        """``vecfleet.create``: the collection's record."""
        name, tenant = _named(job)
        spec = job.payload.get("spec")
        if not isinstance(spec, dict):
            raise CorruptPayload("spec must be a map")
        try:
            chosen = CollectionSpec.from_wire(spec)
        except CorruptPayload as error:
            raise InvalidInput(f"spec: {error.message}", field="spec") from error

        def work() -> Collection:
            collection = self._catalog.create(name, chosen, tenant)
            self._tenants |= {tenant}
            self._adopt(collection)
            self._publish()
            return collection

        return Answer((await self._as_writer(work)).to_wire())

    async def delete(self, job: ClaimedJob) -> Answer:
        """``vecfleet.delete``: the uid of what was deleted.

        A call names one too: it may come again when another collection has the name.
        """
        name, tenant = _named(job)
        meant = job.payload.get("uid")

        def work() -> str:
            if isinstance(meant, str) and self._catalog.was_deleted(meant):
                return meant
            uid = self._catalog.get(name, tenant).uid
            if meant not in (None, uid):
                raise UnknownCollection(
                    f"collection {name!r} was made anew meanwhile; delete it again if you mean it",
                    field="collection",
                )
            self._catalog.delete(name, tenant)  # first: until this is true, nothing is discarded
            if writer := self._writers.pop(uid, None):
                writer.close()  # ends the children, which would go on writing into the folder
            self._deleted = {**self._deleted, uid: tenant}
            self._collections.pop(uid, None)
            self._publish()
            with translated():
                self._redis.delete(keys.version(uid), keys.outstanding(uid))
            self._remove_deleted()
            return uid

        return Answer({"uid": await self._as_writer(work)})

    async def _as_writer(self, work: Callable[[], _Result]) -> _Result:
        """``on_disk``; who has lost the index settles nothing: its jobs are released."""
        try:
            return await self.on_disk(work)
        except StaleWriter:
            self._on_stale()
            await asyncio.Event().wait()
            raise

    def _remove_deleted(self) -> None:
        try:
            self._catalog.remove_deleted()
        except (VecfleetError, OSError) as error:
            log.warning("files of deleted collections stay for now: %s", error)

    def _adopt(self, collection: Collection) -> None:
        if collection.uid not in self._writers:
            directory = self._catalog.directory(collection)
            spec = partition_spec(collection)
            self._writers[collection.uid] = PartitionWriter.open(directory, spec, self._token)
            self._collections[collection.uid] = collection
            self._out_of_service.discard(collection.uid)


def _named(job: ClaimedJob) -> tuple[str, str]:
    if not isinstance(job.payload, dict):
        raise CorruptPayload("a catalogue job's payload is a map")
    tenant = job.payload.get("tenant", keys.DEFAULT_TENANT)
    if tenant != job.queue.tenant:
        raise UnknownCollection("a collection is created and deleted by its own tenant")
    return str(job.payload.get("name")), str(tenant)


def _shard_of(job: ClaimedJob, writer: PartitionWriter) -> Shard:
    """The shard that a merge job carries, or that its deletions come to."""
    if isinstance(job.payload, bytes):
        shard = Shard.parse(job.payload)
        if shard.shard_id != job.id:
            raise CorruptPayload(f"job {job.id} carries the shard of {shard.shard_id}")
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
    return Commit(job.documents, {"version": job.version, "documents": job.documents})
