"""Keeps the catalogue of one home: ``create`` and ``delete`` jobs, and the copy that Redis has."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import redis

from vecfleet.common import codec, keys
from vecfleet.common.collection import Collection, CollectionSpec
from vecfleet.common.errors import (
    CollectionConflict,
    CorruptPayload,
    InvalidInput,
    QueueFull,
    StaleWriter,
    UnknownCollection,
    VecfleetError,
)
from vecfleet.common.redis_client import translated
from vecfleet.worker.catalog import Catalog
from vecfleet.worker.collection_writers import CollectionWriters
from vecfleet.worker.job import Answer, ClaimedJob

log = logging.getLogger(__name__)

_RETRY_S = 60.0
_MOST_RETRY_S = 3600.0  # others may take back their share meanwhile, and the operator raise all
DELETIONS_EACH = 20  # in a week, of each collection that there may be
_LOOK_AT = 1000  # queues, in one round trip

_Result = TypeVar("_Result")


class CatalogKeeper:
    """Changes the catalogue and publishes it, both in the thread of the writers."""

    def __init__(
        self,
        catalog: Catalog,
        writers: CollectionWriters,
        client: redis.Redis,
        on_stale: Callable[[], None],
        max_collections: int,
        max_deleted: int,
    ) -> None:
        """``on_stale`` is called when a newer writer has taken over.

        A tenant may have as many collections as all leave free of ``max_collections``, and may have
        deleted the same share of ``max_deleted`` in a week.
        """
        self._max_collections = max_collections
        self._max_deleted = max_deleted
        self._catalog = catalog
        self._writers = writers
        self._redis = client
        self._on_stale = on_stale
        self._tenants: frozenset[str] = frozenset()  # that have or had a collection

    def open(self) -> None:
        """Publish the catalogue whose writers are open."""
        self._tenants = self._catalog.tenants()
        self.ask_deleted()
        try:
            self._publish()
        except QueueFull as error:
            log.warning("the catalogue is published later: %s", error)

    def publish(self) -> None:
        """Make Redis's copy of the catalogue true again, whatever happened to it; waits for it."""
        # In the thread that creates and deletes: a copy of an older state must not come last.
        self._writers.submit(self._publish).result()

    def ask_deleted(self) -> None:
        """Have those merge queues of deleted collections asked in which there is something.

        So what was on its way is claimed and discarded, and those that are empty cost claims
        nothing.
        """
        deleted = list(self._catalog.deleted(time.time() - keys.SUBMISSION_TTL_S).items())
        asked: dict[str, str] = {}
        for start in range(0, len(deleted), _LOOK_AT):
            some = deleted[start : start + _LOOK_AT]
            with translated():
                pipe = self._redis.pipeline(transaction=False)
                for uid, tenant in some:
                    name = keys.merge_queue(uid, tenant)
                    waiting = keys.queue_list(name), keys.parked(name)
                    pipe.exists(*waiting, keys.lease(name), keys.dead(name))
                found = pipe.execute()
            asked.update(one for one, is_there in zip(some, found, strict=True) if is_there)
        self._writers.ask_deleted(asked)

    def _publish(self) -> None:
        self._catalog.check_writer()  # one who went on after a freeze knows an older state
        # Also of tenants whose last collection was deleted: its record has to go.
        by_tenant: dict[str, dict[str, bytes]] = {tenant: {} for tenant in self._tenants}
        for collection in self._writers.collections():
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

    async def create(self, job: ClaimedJob) -> Answer:
        """``vecfleet.create``: the collection's record.

        A call may run late or again, when its caller has asked anew and deleted what that made:
        then it makes nothing.
        """
        name, tenant = _named(job)
        spec = job.payload.get("spec")
        if not isinstance(spec, dict):
            raise CorruptPayload("spec must be a map")
        try:
            chosen = CollectionSpec.from_wire(spec)
        except CorruptPayload as error:
            raise InvalidInput(f"spec: {error.message}", field="spec") from error

        def work() -> Collection:
            held = self._writers.collections()
            if not any((found.tenant, found.name) == (tenant, name) for found in held):
                self._check_current(name, job)
                self._check_room(tenant, [found.tenant for found in held])
            collection = self._catalog.create(name, chosen, tenant)
            self._tenants |= {tenant}
            self._writers.adopt(collection)
            self._publish()
            return collection

        return Answer((await self._as_writer(work)).to_wire())

    def _check_current(self, name: str, job: ClaimedJob) -> None:
        """Raise ``CollectionConflict`` where a later call has deleted what ``job`` would make.

        One from before its claim: so a Redis whose clock was set back forbids no name for long.
        """
        times_us = job.enqueued_us, job.claimed_us
        if self._catalog.was_deleted_between(name, job.queue.tenant, *times_us):
            raise CollectionConflict(
                f"collection {name!r} was deleted after this was asked for; create it again if you "
                "mean it",
                field="collection",
            )

    def _check_room(self, tenant: str, owners: Sequence[str]) -> None:
        """Raise ``QueueFull`` for a new collection that is more than the tenant's share.

        ``owners`` are the tenants of those that are there.
        """
        if _is_over_share(tenant, owners, self._max_collections):
            raise QueueFull(
                f"this tenant has its share of the {self._max_collections} collections that there "
                "may be: delete some, or have the operator raise VECFLEET_MAX_COLLECTIONS",
                retry_after_s=_RETRY_S,
            )
        # What was sent to a deleted collection may come for so long, and is waited for.
        deleted = self._catalog.deleted(time.time() - keys.SUBMISSION_TTL_S)
        if _is_over_share(tenant, list(deleted.values()), self._max_deleted):
            oldest_s = self._catalog.deleted_s(next(iter(deleted), ""))
            counts_for_s = oldest_s + keys.SUBMISSION_TTL_S - time.time()
            raise QueueFull(
                f"of the {self._max_deleted} collections that may be deleted in a week this tenant "
                "has deleted its share: no more are made until some of that is longer ago",
                retry_after_s=min(max(counts_for_s, _RETRY_S), _MOST_RETRY_S),
            )

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
            # First: until this is true, nothing is discarded.
            self._catalog.delete(name, tenant, job.enqueued_us)
            self._writers.drop(uid, tenant)
            self._publish()
            with translated():
                self._redis.delete(keys.version(uid), keys.outstanding(uid))
            self.remove_deleted()
            return uid

        return Answer({"uid": await self._as_writer(work)})

    async def _as_writer(self, work: Callable[[], _Result]) -> _Result:
        """What ``work`` returns; who has lost the index settles nothing: its jobs are released."""
        try:
            return await self._writers.on_disk(work)
        except StaleWriter:
            self._on_stale()
            await asyncio.Event().wait()
            raise

    def remove_deleted(self) -> None:
        """Remove the files of deleted collections; what cannot be removed now stays for later."""
        try:
            self._catalog.remove_deleted()
        except (VecfleetError, OSError) as error:
            log.warning("files of deleted collections stay for now: %s", error)


def _is_over_share(tenant: str, tenants: Sequence[str], most: int) -> bool:
    """Whether one more of ``tenant`` is more than all of ``tenants`` leave free of ``most``."""
    return tenants.count(tenant) >= most - len(tenants)


def _named(job: ClaimedJob) -> tuple[str, str]:
    if not isinstance(job.payload, dict):
        raise CorruptPayload("a catalogue job's payload is a map")
    tenant = job.payload.get("tenant", keys.DEFAULT_TENANT)
    if tenant != job.queue.tenant:
        raise UnknownCollection("a collection is created and deleted by its own tenant")
    return str(job.payload.get("name")), str(tenant)
