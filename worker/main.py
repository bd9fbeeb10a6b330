"""The composition root of a worker with an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

from vecfleet.common import keys, payloads
from vecfleet.common.redis_client import connect
from vecfleet.worker.activity import Activity
from vecfleet.worker.batch_worker import BatchWorker
from vecfleet.worker.embed_handler import EmbedHandler
from vecfleet.worker.engine import Engine
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.engines import load_engine
from vecfleet.worker.handlers import Handlers, Many, One
from vecfleet.worker.heartbeat import OnEvent
from vecfleet.worker.ledger import Announcement, Ledger
from vecfleet.worker.progress import ProgressWatch
from vecfleet.worker.proven_engine import ProvenEngine
from vecfleet.worker.quarantine import Quarantine
from vecfleet.worker.rerank_handler import RerankHandler
from vecfleet.worker.resources import MachineGauge, ResourceWatch
from vecfleet.worker.role import beside, every, saying, stop_on_signals, unique_name
from vecfleet.worker.status import EngineStatus
from vecfleet.worker.window import ResourceLimits, Window, interactive_tokens

_BULK_TOKENS = 131_072  # about four blocks of passages: the next ones are there when one is done


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


LoadEngine = Callable[[EngineSettings], Awaitable[Engine]]


def run_worker(
    config: WorkerConfig, on_event: OnEvent | None = None, load: LoadEngine = load_engine
) -> int:
    """Embed and rerank until SIGTERM or SIGINT; returns the exit code.

    Raises as ``load``, and ``EngineFailed`` where the engine fails on a text of our own.
    """
    return asyncio.run(_worker(config, on_event, load))


async def _worker(config: WorkerConfig, on_event: OnEvent | None, load: LoadEngine) -> int:
    ends = stop_on_signals()
    ledger = Ledger(
        connect(config.redis_url),
        config.name or unique_name("worker"),
        dead_ttl_s=config.dead_ttl_s,
        max_merge_bytes=config.max_merge_bytes,
        max_unmerged_bytes=config.max_unmerged_bytes,
    )
    engine, packing = ProvenEngine(await load(config.engine)), Activity()
    try:
        ProgressWatch(
            engine,
            config.max_step_s,
            loop=asyncio.get_running_loop(),
            threads={"the packing of a shard has not ended": packing},
        ).start()
        # What broke at the first texts that it claimed would pass for broken by them.
        await engine.prove()
        return await _serve(engine, packing, ledger, config, ends, on_event)
    finally:
        await engine.close()


async def _serve(
    engine: Engine,
    packing: Activity,
    ledger: Ledger,
    config: WorkerConfig,
    ends: tuple[asyncio.Event, asyncio.Event],
    on_event: OnEvent | None,
) -> int:
    """Do the jobs of ``engine``'s queues until ``ends``: stop, and hurry; returns the exit code."""
    stop, hurry = ends
    code = 0
    loop = asyncio.get_running_loop()

    def on_broken() -> None:
        nonlocal code
        code = 1  # whoever supervises starts a new one
        stop.set()
        hurry.set()

    card = engine.card
    queues = _engine_queues(engine)
    pools = tuple(dict.fromkeys(queue.pool for queue in queues))
    urgent = [queue for queue in queues if queue.lane == "interactive"]
    windows = _engine_windows(engine)
    watch = ResourceWatch(windows, config.limits, MachineGauge(engine.device), width=card.dimension)
    quarantine = Quarantine(ledger, windows, urgent=lambda: urgent)
    worker = BatchWorker(
        ledger,
        queues=lambda: queues,
        handlers=_engine_handlers(engine, quarantine, packing),
        windows=windows,
        quarantine=quarantine,
        announce=_announcer(
            engine,
            pools,
            watch,
            windows["interactive"],
            partial(loop.call_soon_threadsafe, on_broken),
        ),
        on_broken=on_broken,
        is_ready=lambda: engine.stats.state == "ready",
        on_event=saying(
            f"worker ready: {card.name} on {card.engine} ({card.dtype}, {card.space})", on_event
        ),
    )
    remember = partial(quarantine.poison.refresh, pools)
    with closing(watch):
        await asyncio.to_thread(watch.check)
        await asyncio.to_thread(remember)
        watching = every(config.limits.check_s, watch.check, stop.set)
        async with beside(watching, every(keys.HEARTBEAT_S, remember, stop.set)):
            await worker.run(stop, hurry=hurry)
    return code


def _announcer(
    engine: Engine,
    pools: tuple[str, ...],
    watch: ResourceWatch,
    queries: Window,
    on_broken: Callable[[], object],
) -> Callable[[], Announcement]:
    """What the worker says of itself, asked on any thread; ``on_broken`` is called there too.

    ``queries`` is moved as the engine's speed gets known.
    """
    status = EngineStatus(engine)

    def announce() -> Announcement:
        queries.limit(interactive_tokens(status.tokens_per_s, engine.stats.step_tokens))
        says = {**status.fields(), **watch.fields()}
        state = engine.stats.state
        if state == "ready":
            return Announcement(engine.card, pools, says)
        if state == "broken":
            on_broken()
        return Announcement(engine.card, (), says, state)  # it serves no pool

    return announce


def _engine_windows(engine: Engine) -> dict[keys.Lane, Window]:
    queries = interactive_tokens(0.0, engine.stats.step_tokens)
    return {
        "interactive": Window(max_tokens=queries, max_jobs=512, min_jobs=2),
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
