"""The composition roots of the roles behind the queue: worker, aggregator, search."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vecfleet.common import keys, payloads
from vecfleet.common.errors import StaleWriter, VecfleetError
from vecfleet.common.limits import WINDOW_TOKENS
from vecfleet.common.redis_client import connect
from vecfleet.worker.activity import Activity
from vecfleet.worker.batch_worker import BatchWorker
from vecfleet.worker.embed_handler import EmbedHandler
from vecfleet.worker.engine import Engine
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.engines import load_engine
from vecfleet.worker.handlers import Direct, Handlers, Many, One
from vecfleet.worker.heartbeat import OnEvent
from vecfleet.worker.ledger import Announcement, Ledger
from vecfleet.worker.progress import ProgressWatch
from vecfleet.worker.quarantine import Quarantine
from vecfleet.worker.rerank_handler import RerankHandler
from vecfleet.worker.status import EngineStatus
from vecfleet.worker.window import ResourceLimits, Window
from vecfleet.worker.writer_lease import WriterLease

if TYPE_CHECKING:
    from vecfleet.worker.aggregator import Aggregator

log = logging.getLogger(__name__)

INDEX_FOLDER = "index"
_PUBLISH_S = 10.0
_SWEEP_S = 10.0
_LEASE_RENEW_S = 2.0
_MERGE_JOBS = 256
_BULK_TOKENS = 131_072  # about four blocks of passages: the next ones are there when one is done
_NO_LIMIT = 1 << 40
_SEARCH_TOKENS = 1024  # see limits.search_tokens: 10,000 hits


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """A worker with one engine."""

    redis_url: str
    engine: EngineSettings
    name: str | None = None  # unique among the living
    limits: ResourceLimits = field(default_factory=ResourceLimits)
    max_step_s: float = 120.0  # without any progress, the process ends
    dead_ttl_s: int = keys.DEAD_TTL_S
    max_merge_bytes: int = 512 << 20
    max_unmerged_bytes: int = 2 << 30


@dataclass(frozen=True, slots=True)
class AggregatorConfig:
    """The writer of an index, or the search process over it."""

    redis_url: str
    data_dir: Path
    home: str = keys.DEFAULT_HOME
    dead_ttl_s: int = keys.DEAD_TTL_S
    max_merge_bytes: int = 512 << 20


LoadEngine = Callable[[EngineSettings], Awaitable[Engine]]


def run_worker(
    config: WorkerConfig, on_event: OnEvent | None = None, load: LoadEngine = load_engine
) -> int:
    """Embed and rerank until SIGTERM or SIGINT; returns the exit code."""
    return asyncio.run(_worker(config, on_event, load))


def run_aggregator(config: AggregatorConfig, on_event: OnEvent | None = None) -> int:
    """Merge shards and keep the catalogue until SIGTERM or SIGINT; returns the exit code."""
    return asyncio.run(_aggregator(config, on_event))


def run_search(config: AggregatorConfig, on_event: OnEvent | None = None) -> int:
    """Answer reads until SIGTERM or SIGINT; returns the exit code."""
    return asyncio.run(_search(config, on_event))


async def _worker(config: WorkerConfig, on_event: OnEvent | None, load: LoadEngine) -> int:
    # Here, so that the aggregator runs where what reads the machine is not installed.
    from vecfleet.worker.resources import MachineGauge, ResourceWatch

    stop, hurry = _stop_on_signals()
    code = 0
    client = connect(config.redis_url)
    engine = await load(config.engine)
    try:
        card = engine.card
        loop = asyncio.get_running_loop()
        queues = _engine_queues(engine)
        pools = tuple(dict.fromkeys(queue.pool for queue in queues))
        status = EngineStatus(engine)
        windows = _engine_windows()
        gauge = MachineGauge(engine.device)
        watch = ResourceWatch(windows, config.limits, gauge, width=card.dimension)
        await asyncio.to_thread(watch.check)
        watching = asyncio.create_task(_every(config.limits.check_s, watch.check, stop.set))

        def on_broken() -> None:
            nonlocal code
            code = 1  # whoever supervises starts a new one
            stop.set()
            hurry.set()

        def announce() -> Announcement:
            says = {**status.fields(), **watch.fields()}
            state = engine.stats.state
            if state == "ready":
                return Announcement(card, pools, says)
            if state == "broken":
                loop.call_soon_threadsafe(on_broken)
            return Announcement(card, (), says, state)  # it serves no pool

        ledger = Ledger(
            client,
            config.name or _unique_name("worker"),
            dead_ttl_s=config.dead_ttl_s,
            max_merge_bytes=config.max_merge_bytes,
            max_unmerged_bytes=config.max_unmerged_bytes,
        )
        urgent = [queue for queue in queues if queue.lane == "interactive"]
        packing = Activity()
        quarantine = Quarantine(ledger, windows, urgent=lambda: urgent)
        worker = BatchWorker(
            ledger,
            queues=lambda: queues,
            handlers=_engine_handlers(engine, quarantine, packing),
            windows=windows,
            quarantine=quarantine,
            announce=announce,
            on_broken=on_broken,
            is_ready=lambda: engine.stats.state == "ready",
            on_event=_saying(
                f"worker ready: {card.name} on {card.engine} ({card.dtype}, {card.space})", on_event
            ),
        )
        remember = partial(quarantine.poison.refresh, pools)
        await asyncio.to_thread(remember)
        remembering = asyncio.create_task(_every(keys.HEARTBEAT_S, remember, stop.set))
        progress = ProgressWatch(
            engine,
            config.max_step_s,
            loop=loop,
            threads={"the packing of a shard has not ended": packing},
        )
        progress.start()
        try:
            await worker.run(stop, hurry=hurry)
        finally:
            await asyncio.to_thread(progress.stop)
            watching.cancel()
            remembering.cancel()
            await asyncio.gather(watching, remembering, return_exceptions=True)
            watch.close()
    finally:
        await engine.close()
    return code


def _engine_windows() -> dict[keys.Lane, Window]:
    return {
        "interactive": Window(max_tokens=WINDOW_TOKENS, max_jobs=512),
        "bulk": Window(max_tokens=_BULK_TOKENS, max_jobs=32, min_jobs=2),
    }


def _engine_queues(engine: Engine) -> Sequence[keys.QueueName]:
    card = engine.card
    named = {"embed": keys.embed_queue, "rerank": keys.rerank_queue}
    return [
        named[task](card.space, lane, keys.EVERY_TENANT)
        for lane in keys.LANES
        for task in card.tasks
    ]


def _engine_handlers(engine: Engine, quarantine: Quarantine, packing: Activity) -> Handlers:
    handlers: dict[str, One | Many] = {}
    if "embed" in engine.card.tasks:
        handlers[payloads.EMBED] = One(EmbedHandler(engine, quarantine, packing))
    if "rerank" in engine.card.tasks:
        handlers[payloads.RERANK] = One(RerankHandler(engine, quarantine))
    return handlers


async def _aggregator(config: AggregatorConfig, on_event: OnEvent | None) -> int:
    # Here, so that a worker runs where the index library is not installed.
    from vecfleet.worker.aggregator import Aggregator
    from vecfleet.worker.catalog import Catalog

    stop, hurry = _stop_on_signals()
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

    renewing = asyncio.create_task(_every(_LEASE_RENEW_S, lease.renew, on_stale))
    try:
        catalog = Catalog.open(config.data_dir / INDEX_FOLDER, config.home, lease.token)
        aggregator = Aggregator(catalog, client, lease.token, on_stale=on_stale)
        try:
            await aggregator.writers.on_disk(aggregator.open)
            await _merge(aggregator, config, (stop, hurry), on_stale, on_event)
        finally:
            await asyncio.to_thread(aggregator.close)
    finally:
        renewing.cancel()
        await asyncio.gather(renewing, return_exceptions=True)
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
    chores = [
        asyncio.create_task(_every(_PUBLISH_S, aggregator.keeper.publish, on_stale)),
        asyncio.create_task(aggregator.maintain()),
    ]
    worker = BatchWorker(
        Ledger(
            connect(config.redis_url),
            _unique_name("aggregator"),
            dead_ttl_s=config.dead_ttl_s,
            max_merge_bytes=config.max_merge_bytes,
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
        on_event=_saying(f"aggregator ready: {config.data_dir}", on_event),
    )
    try:
        await worker.run(stop, hurry=hurry)
    finally:
        for chore in chores:
            chore.cancel()
        await asyncio.gather(*chores, return_exceptions=True)


async def _search(config: AggregatorConfig, on_event: OnEvent | None) -> int:
    from vecfleet.worker.search_handler import SearchHandler

    stop, hurry = _stop_on_signals()
    client = connect(config.redis_url)
    handler = SearchHandler(config.data_dir / INDEX_FOLDER)
    queues = [keys.search_queue(config.home, keys.EVERY_TENANT)]
    worker = BatchWorker(
        Ledger(client, _unique_name("search")),
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
        on_event=_saying(f"search ready: {config.data_dir}", on_event),
    )
    sweep = asyncio.create_task(_every(_SWEEP_S, handler.forget_deleted, stop.set))
    try:
        await worker.run(stop, hurry=hurry)
    finally:
        sweep.cancel()
        await asyncio.gather(sweep, return_exceptions=True)
        await asyncio.to_thread(handler.close)
    return 0


async def _acquire(lease: WriterLease, stop: asyncio.Event) -> bool:
    """Wait for the writer's lease without holding the loop; a signal ends the waiting."""
    given_up = threading.Event()
    watcher = asyncio.create_task(stop.wait())
    watcher.add_done_callback(lambda _: given_up.set())
    try:
        return await asyncio.to_thread(lease.acquire, given_up)
    finally:
        watcher.cancel()


async def _every(period_s: float, chore: Callable[[], None], on_stale: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(period_s)
        try:
            await asyncio.to_thread(chore)
        except StaleWriter as error:
            log.error("%s", error)
            on_stale()
            return
        except VecfleetError as error:
            log.warning("%s", error)
        except Exception:
            log.exception("a chore failed; it is tried again")


def _stop_on_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """The first SIGTERM or SIGINT asks to stop, the second to hurry."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop, hurry


def _saying(line: str, on_event: OnEvent | None) -> OnEvent:
    """Log ``line`` once the worker is ready, that is: registered and announced."""

    def tell(name: str, count: int) -> None:
        if name == "ready":
            log.info("%s", line)
        if on_event is not None:
            on_event(name, count)

    return tell


def _unique_name(role: str) -> str:
    """Never used again: RQ keeps a dead worker's name for a while."""
    return f"{role}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
