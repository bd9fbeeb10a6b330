"""The aggregator: all that writes the index of one home."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import redis

from vecfleet.common import keys
from vecfleet.common.errors import CorruptManifest, StaleWriter
from vecfleet.common.limits import MAX_COLLECTIONS
from vecfleet.common.redis_client import read_lua, translated
from vecfleet.worker.catalog import Catalog
from vecfleet.worker.catalog_keeper import DELETIONS_EACH, CatalogKeeper
from vecfleet.worker.collection_writers import CollectionWriters
from vecfleet.worker.merger import Merger
from vecfleet.worker.partition import PartitionWriter

log = logging.getLogger(__name__)

_MAINTAIN_S = 0.5
_WATERMARK_S = 10.0
_WATERMARK_MEMBERS = 10_000
RESUMABLE_S = 30 * 24 * 3600  # how old versions may be that a resumed producer still brings


class Aggregator:
    """Owns the catalogue and its collections' writers: merges, keeps and maintains."""

    def __init__(
        self,
        catalog: Catalog,
        client: redis.Redis,
        token: int,
        *,
        on_stale: Callable[[], None],
        max_collections: int = MAX_COLLECTIONS,
        max_deleted: int = DELETIONS_EACH * MAX_COLLECTIONS,
    ) -> None:
        """``token`` fences the writers; ``on_stale`` is called when a newer one has taken over.

        ``max_collections`` and ``max_deleted`` are those of all tenants; see ``CatalogKeeper``.
        """
        self._catalog = catalog
        self._redis = client
        self._on_stale = on_stale
        self.writers = CollectionWriters(catalog, token)
        self.merger = Merger(self.writers, on_stale)
        self.keeper = CatalogKeeper(
            catalog, self.writers, client, on_stale, max_collections, max_deleted
        )
        self._watermark = client.register_script(read_lua(Path(__file__).parent, "watermark"))
        self._watermark_at: dict[str, float] = {}  # when each is due, by uid

    def open(self) -> None:
        """Open every collection's writer and publish the catalogue; in the writers' thread."""
        self.writers.open()
        self.keeper.open()

    def close(self) -> None:
        """Close the writers; call it when no job runs."""
        self.writers.close()
        self._catalog.close()

    def queues(self) -> list[keys.QueueName]:
        """The merge queue of every collection, and the catalogue's own."""
        catalog_queue = keys.catalog_queue(self._catalog.home, keys.EVERY_TENANT)
        return [catalog_queue, *self.writers.merge_queues()]

    async def maintain(self) -> None:
        """Keep segments few and indexes built, for ever; children do the work."""
        while True:
            for uid, writer in self.writers.items():
                try:
                    await self.writers.on_disk(lambda: self._maintain(uid, writer))  # noqa: B023
                except StaleWriter:
                    self._on_stale()
                    return
                except Exception:
                    log.exception("maintenance of %s failed; it is tried again", uid)
            await self.writers.on_disk(self.keeper.remove_deleted)
            await asyncio.sleep(_MAINTAIN_S)

    def _maintain(self, uid: str, writer: PartitionWriter) -> None:
        if self.writers.get(uid) is not writer:
            return  # deleted meanwhile
        now = time.monotonic()
        watermark = None
        if now >= self._watermark_at.get(uid, 0.0):
            self._watermark_at[uid] = now + _WATERMARK_S
            watermark = self._watermark_of(uid)
        try:
            report = writer.maintain(watermark=watermark)
        except CorruptManifest as error:
            self.writers.retire(uid, error)
            return
        for failure in report.failed:
            log.warning("maintenance of %s failed, tried again later: %s", uid, failure)

    def _watermark_of(self, uid: str) -> int | None:
        """Below this version nothing can arrive any more; None where callers give the versions."""
        if self.writers.collection(uid).spec.versions != "assigned":
            return None
        names = [keys.outstanding(uid), keys.version(uid)]
        with translated():
            lowest = int(self._watermark(keys=names, args=[_WATERMARK_MEMBERS]))
            now_s, _ = cast(Any, self._redis.time())  # versions are drawn from Redis's clock
        # A producer that resumes brings old versions; what is in the dead letter is outstanding.
        resumable = (now_s - RESUMABLE_S) * 1_000_000
        return min(lowest, resumable) or None
