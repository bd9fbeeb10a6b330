"""The composition root of the search process over an index."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from vecfleet.common import keys, payloads
from vecfleet.common.open_files import allow_files
from vecfleet.common.redis_client import connect
from vecfleet.worker.batch_worker import BatchWorker
from vecfleet.worker.catalog import INDEX_FOLDER
from vecfleet.worker.handlers import Direct, One
from vecfleet.worker.heartbeat import OnEvent
from vecfleet.worker.ledger import Announcement, Ledger
from vecfleet.worker.role import beside, every, saying, stop_on_signals, unique_name
from vecfleet.worker.search_handler import SearchHandler
from vecfleet.worker.window import Window

_SWEEP_S = 10.0
_SEARCH_TOKENS = 1024  # see limits.search_tokens: 10,000 hits


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """What answers reads of one index."""

    redis_url: str
    data_dir: Path
    home: str = keys.DEFAULT_HOME


def run_search(config: SearchConfig, on_event: OnEvent | None = None) -> int:
    """Answer reads until SIGTERM or SIGINT; returns the exit code."""
    allow_files()
    return asyncio.run(_search(config, on_event))


async def _search(config: SearchConfig, on_event: OnEvent | None) -> int:
    stop, hurry = stop_on_signals()
    client = connect(config.redis_url)
    handler = SearchHandler(config.data_dir / INDEX_FOLDER)
    queues = [keys.search_queue(config.home, keys.EVERY_TENANT)]
    worker = BatchWorker(
        Ledger(client, unique_name("search")),
        queues=lambda: queues,
        handlers={
            payloads.SEARCH: Direct(handler.search),
            payloads.GET: One(handler.get),
            payloads.UNCHANGED: One(handler.unchanged),
            payloads.STATS: One(handler.stats),
        },
        windows={"interactive": Window(max_tokens=_SEARCH_TOKENS, max_jobs=128)},
        announce=lambda: Announcement(
            pools=tuple(queue.pool for queue in queues), status={"role": "search"}
        ),
        on_event=saying(f"search ready: {config.data_dir}", on_event),
    )
    try:
        async with beside(every(_SWEEP_S, handler.forget_deleted, stop.set)):
            await worker.run(stop, hurry=hurry)
    finally:
        await asyncio.to_thread(handler.close)
    return 0
