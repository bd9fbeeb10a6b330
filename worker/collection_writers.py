"""The writers of all collections of one home, and the one thread in which they write."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from vecfleet.common import keys
from vecfleet.common.collection import Collection
from vecfleet.common.errors import (
    CorruptManifest,
    SpaceMismatch,
    StaleWriter,
    Unavailable,
    VecfleetError,
)
from vecfleet.worker.catalog import Catalog, partition_spec
from vecfleet.worker.partition import PartitionWriter

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class CollectionWriters:
    """One writer a collection; whoever calls what writes does so in their thread."""

    def __init__(self, catalog: Catalog, token: int) -> None:
        """``token`` fences the writers."""
        self._catalog = catalog
        self._token = token
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="disk")
        self._writers: dict[str, PartitionWriter] = {}
        self._collections: dict[str, Collection] = {}
        self._out_of_service: set[str] = set()  # uids whose manifest cannot be read
        self._deleted: dict[str, str] = {}  # the tenants, by uid, of those that are asked for

    def submit(self, work: Callable[[], _Result]) -> Future[_Result]:
        """Run ``work`` in the one thread that writes."""
        return self._disk.submit(work)

    async def on_disk(self, work: Callable[[], _Result]) -> _Result:
        """``submit``, and wait for it without holding the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)

    def open(self) -> None:
        """Open every collection's writer."""
        for collection in self._catalog.list():
            try:
                self.adopt(collection)
            except Unavailable as error:
                log.error("cannot open %s, trying again with its shards: %s", collection.uid, error)
            except (CorruptManifest, SpaceMismatch) as error:
                self.retire(collection.uid, error)

    def close(self) -> None:
        """End the thread and close the writers; call it when nothing else is running."""
        self._disk.shutdown()
        for writer in self._writers.values():
            writer.close()

    def collections(self) -> list[Collection]:
        """All collections, also those out of service."""
        return list(self._collections.values())

    def collection(self, uid: str) -> Collection:
        """One that has a writer."""
        return self._collections[uid]

    def merge_queues(self) -> list[keys.QueueName]:
        """The queues whose shards are applied, or discarded with their collection."""
        return [
            *(
                collection.merge_queue
                for collection in self.collections()
                if collection.uid not in self._out_of_service
            ),
            *(keys.merge_queue(uid, tenant) for uid, tenant in self._deleted.items()),
        ]

    def items(self) -> list[tuple[str, PartitionWriter]]:
        """The open writers, by uid."""
        return list(self._writers.items())

    def get(self, uid: str) -> PartitionWriter | None:
        """The writer of a collection, if it is open."""
        return self._writers.get(uid)

    def opened(self, uid: str) -> PartitionWriter | None:
        """``get``; one that could not be opened when it was tried last is tried again.

        Raises ``Unavailable`` where it cannot be opened now either.
        """
        collection = self._collections.get(uid)
        if uid in self._writers or collection is None or uid in self._out_of_service:
            return self._writers.get(uid)
        try:
            self.adopt(collection)
        except (CorruptManifest, SpaceMismatch) as error:
            self.retire(uid, error)
        return self._writers.get(uid)

    def adopt(self, collection: Collection) -> None:
        """Open the writer of ``collection`` unless it is open; it is known from now on anyway."""
        self._collections[collection.uid] = collection
        if collection.uid not in self._writers:
            directory = self._catalog.directory(collection)
            spec = partition_spec(collection)
            self._writers[collection.uid] = PartitionWriter.open(directory, spec, self._token)
            self._out_of_service.discard(collection.uid)

    def retire(self, uid: str, error: VecfleetError) -> None:
        """Take a collection out of service: its files stay as they are, its shards in Redis."""
        self._out_of_service.add(uid)
        if writer := self._writers.pop(uid, None):
            writer.close()
        log.error("collection %s is out of service: %s", self._collections[uid].name, error)

    def drop(self, uid: str, tenant: str) -> None:
        """Close the writer of a collection that was deleted; from now on its shards go nowhere."""
        if writer := self._writers.pop(uid, None):
            writer.close()  # ends the children, which would go on writing into the folder
        self._deleted = {**self._deleted, uid: tenant}
        self._collections.pop(uid, None)

    def ask_deleted(self, tenants: dict[str, str]) -> None:
        """Of the deleted collections, ask the merge queues of these uids, with their tenants."""
        self._deleted = tenants

    def was_deleted(self, uid: str) -> bool:
        """Whether there was such a collection once."""
        return self._catalog.was_deleted(uid)

    def are_stale(self) -> bool:
        """Whether a newer owner has taken the home over."""
        try:
            self._catalog.check_writer()
        except StaleWriter:
            return True
        return False
