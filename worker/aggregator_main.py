"""The composition root of the aggregator's writer."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vecfleet.common import keys, payloads
from vecfleet.common.limits import MAX_COLLECTIONS
from vecfleet.common.open_files import allow_files
from vecfleet.common.redis_client import connect
from vecfleet.worker.aggregator import Aggregator
from vecfleet.worker.batch_worker import BatchWorker
from vecfleet.worker.catalog import INDEX_FOLDER, Catalog
from vecfleet.worker.catalog_keeper import DELETIONS_EACH
from vecfleet.worker.handlers import Many, One
from vecfleet.worker.heartbeat import OnEvent
from vecfleet.worker.ledger import Announcement, Ledger
from vecfleet.worker.role import beside, every, saying, stop_on_signals, unique_name
from vecfleet.worker.window import Window
from vecfleet.worker.writer_lease import WriterLease

log = logging.getLogger(__name__)

_PUBLISH_S = 10.0
_ASK_DELETED_S = 5.0
_LEASE_RENEW_S = 2.0
_MERGE_JOBS = 256
_NO_LIMIT = 1 << 40
_FILES_EACH = 16  # of a collection: four, and one a segment


@dataclass(frozen=True, slots=True)
class AggregatorConfig:
    """The writer of an index."""

    redis_url: str
    data_dir: Path
    home: str = keys.DEFAULT_HOME
    dead_ttl_s: int = keys.DEAD_TTL_S
    max_merge_bytes: int = 512 << 20
    max_unmerged_bytes: int = 2 << 30
    max_collections: int = MAX_COLLECTIONS


def run_aggregator(config: AggregatorConfig, on_event: OnEvent | None = None) -> int:
    """Merge shards and keep the catalogue until SIGTERM or SIGINT; returns the exit code."""
    return asyncio.run(_aggregator(config, on_event))


async def _aggregator(config: AggregatorConfig, on_event: OnEvent | None) -> int:
    stop, hurry = stop_on_signals()
    client = connect(config.redis_url)
    lease = WriterLease(client, config.home)
    if not await _acquire(lease, stop):
        return 0
    loop = asyncio.get_running_loop()
    stale = False

    def on_stale() -> None:
        nonlocal stale
        stale = True
        loop.call_soon_threadsafe(stop.set)
        loop.call_soon_threadsafe(hurry.set)

    try:
        async with beside(every(_LEASE_RENEW_S, lease.renew, on_stale)):
            catalog = Catalog.open(config.data_dir / INDEX_FOLDER, config.home, lease.token)
            aggregator = Aggregator(
                catalog,
                client,
                lease.token,
                on_stale=on_stale,
                max_collections=_allowed_collections(config.max_collections, allow_files()),
                # Those cost no files: what is deleted is bounded by what was asked for.
                max_deleted=DELETIONS_EACH * config.max_collections,
            )
            try:
                await aggregator.writers.on_disk(aggregator.open)
                await _merge(aggregator, config, (stop, hurry), on_stale, on_event)
            finally:
                await asyncio.to_thread(aggregator.close)
    finally:
        await asyncio.to_thread(lease.release)
    return 1 if stale else 0


async def _merge(
    aggregator: Aggregator,
    config: AggregatorConfig,
    ends: tuple[asyncio.Event, asyncio.Event],
    on_stale: Callable[[], None],
    on_event: OnEvent | None,
) -> None:
    """Do the jobs and chores of an open aggregator until ``ends``: stop, and hurry."""
    stop, hurry = ends
    worker = BatchWorker(
        Ledger(
            connect(config.redis_url),
            unique_name("aggregator"),
            dead_ttl_s=config.dead_ttl_s,
            max_merge_bytes=config.max_merge_bytes,
            max_unmerged_bytes=config.max_unmerged_bytes,
        ),
        queues=aggregator.queues,
        handlers={
            payloads.MERGE: Many(aggregator.merger.merge),
            payloads.CREATE: One(aggregator.keeper.create),
            payloads.DELETE: One(aggregator.keeper.delete),
        },
        windows={
            "interactive": Window(max_tokens=_NO_LIMIT, max_jobs=64),
            "bulk": Window(max_tokens=_NO_LIMIT, max_jobs=_MERGE_JOBS),
        },
        announce=lambda: Announcement(
            pools=tuple(dict.fromkeys(queue.pool for queue in aggregator.queues())),
            status={"role": "aggregator", "discarded": aggregator.merger.discarded},
        ),
        on_event=saying(f"aggregator ready: {config.data_dir}", on_event),
    )
    publishing = every(_PUBLISH_S, aggregator.keeper.publish, on_stale)
    asking = every(_ASK_DELETED_S, aggregator.keeper.ask_deleted, on_stale)
    async with beside(publishing, asking, aggregator.maintain()):
        await worker.run(stop, hurry=hurry)


def _allowed_collections(wanted: int, files: int | None) -> int:
    """How many of ``wanted`` collections a process that may open so many files can have."""
    if files is None or files >= wanted * _FILES_EACH:
        return wanted
    most = max(1, files // _FILES_EACH)
    log.warning(
        "at most %d collections, not %d: this process may open %d files (ulimit -n)",
        *(most, wanted, files),
    )
    return most


async def _acquire(lease: WriterLease, stop: asyncio.Event) -> bool:
    """Wait for the writer's lease without holding the loop; a signal ends the waiting."""
    given_up = threading.Event()
    watcher = asyncio.create_task(stop.wait())
    watcher.add_done_callback(lambda _: given_up.set())
    try:
        return await asyncio.to_thread(lease.acquire, given_up)
    finally:
        watcher.cancel()
