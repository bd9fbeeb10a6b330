"""What the fleet adds to a real engine: ratios within one run, and a single query's way."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from vecfleet.bench import http_client
from vecfleet.bench.child import Child
from vecfleet.bench.context import Bench
from vecfleet.bench.processes import children_stopped
from vecfleet.bench.rig import Rig
from vecfleet.bench.stats import median, quantile, rounded
from vecfleet.bench.targets import Measured

RATIOS = frozenset(("fleet_efficiency", "http_efficiency", "engine_vs_plain"))
TEXTS_A_REQUEST = 64
REQUESTS_AT_ONCE = 8
SINGLES_AT_ONCE = 32
SATURATING_QUERIES = 64  # at once
SATURATING_BLOCKS = 8  # more than a worker claims ahead, soon done when it ends
ENDLESS = 100_000_000  # documents; the feeder is told to stop
MAX_STEP_MS = 150
WAIT_ALLOWED_MS = 10  # beside the steps


async def measure(bench: Bench, keys: set[str]) -> dict[str, Measured]:
    """All figures that need a model, on one fleet."""
    pool = bench.pool("passages")
    found: dict[str, Measured] = {}
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(bench.rig())
        feeder = await stack.enter_async_context(rig.feeder(pool))
        if keys & RATIOS:
            bench.say("starting the bare engine and the plain baseline")
            async with (
                Child("bare_engine", bench.folder / "bare.log", bench.model, str(pool)) as bare,
                Child("plain_engine", bench.folder / "plain.log", bench.model, str(pool)) as plain,
            ):
                found |= await Ratios(bench, rig, feeder, bare, plain).measure(keys)
        if "http_overhead_p50_ms" in keys:
            found["http_overhead_p50_ms"] = await _overhead(bench, rig)
        if "single_requests_per_s" in keys:
            found["single_requests_per_s"] = await _singles(bench, rig)
        if "interactive_p99_steps" in keys:
            found["interactive_p99_steps"] = await _interactive(bench, rig, feeder)
        if "bulk_share_under_interactive" in keys:
            found["bulk_share_under_interactive"] = await _bulk_share(bench, rig, feeder)
    return found


class Ratios:
    """Bare, fleet, HTTP and plain in turns; each is compared with the bare runs around it."""

    def __init__(
        self, bench: Bench, rig: Rig, feeder: Child, bare: Child, plain: Child | None = None
    ) -> None:
        self._bench = bench
        self._rig = rig
        self._feeder = feeder
        self._bare = bare
        self._plain = plain
        self._texts = bench.passages[: bench.sizes.passages]
        self._runs = 0

    async def measure(self, keys: set[str]) -> dict[str, Measured]:
        """The ratios that ``keys`` ask for."""
        ways = {
            "fleet_efficiency": self._fleet_rate,
            "vllm_fleet_efficiency": self._fleet_rate,
            "http_efficiency": self._http_rate,
            "engine_vs_plain": self._plain_rate,
        }
        wanted = {key: way for key, way in ways.items() if key in keys}
        await self._bare_rate()  # the first run loads code and opens connections
        if self._plain is not None:
            await self._plain_rate()  # and both have loaded: the fleet's worker would yield to that
        for way in wanted.values():
            await self._alone(way)
        rates: dict[str, list[float]] = {key: [] for key in wanted}
        ratios: dict[str, list[float]] = {key: [] for key in wanted}
        bare = [await self._bare_rate()]
        for _ in range(self._bench.sizes.repetitions):
            for key, way in wanted.items():
                rates[key].append(await self._alone(way))
                bare.append(await self._bare_rate())
                ratio = rates[key][-1] / math.sqrt(bare[-2] * bare[-1])
                ratios[key].append(1 / ratio if key == "engine_vs_plain" else ratio)
                self._bench.say(f"{key}: {ratios[key][-1]:.3f} at {bare[-1]:.0f} docs/s bare")
        return {
            key: Measured(
                median(ratios[key]),
                {
                    "ratios": rounded(ratios[key]),
                    "docs_per_s": rounded(rates[key], 1),
                    "bare_docs_per_s": rounded(bare, 1),
                },
            )
            for key in wanted
        }

    async def _alone(self, way: Callable[[], Awaitable[float]]) -> float:
        with children_stopped(self._bare.pid):
            return await way()

    async def _bare_rate(self) -> float:
        with children_stopped(self._rig.worker_pid):
            return _rate(await self._bare.ask("embed"))

    async def _plain_rate(self) -> float:
        assert self._plain is not None
        return _rate(await self._plain.ask("embed"))

    async def _fleet_rate(self) -> float:
        self._runs += 1
        name = f"run-{self._runs}"
        await self._rig.client.create_collection(name)
        fed = await self._feeder.ask(
            "ingest", collection=name, first=0, count=len(self._texts), blocks=None
        )
        await self._rig.client.delete_collection(name)
        return float(fed["documents"] / fed["seconds"])

    async def _http_rate(self) -> float:
        requests = [
            http_client.embeddings_request(self._texts[start : start + TEXTS_A_REQUEST])
            for start in range(0, len(self._texts), TEXTS_A_REQUEST)
        ]
        seconds = await http_client.send_all(self._rig.address, requests, REQUESTS_AT_ONCE)
        return len(self._texts) / seconds


def _rate(answer: dict[str, Any]) -> float:
    return float(answer["texts"] / answer["seconds"])


def _single_requests(bench: Bench) -> list[bytes]:
    return [http_client.embeddings_request([query]) for query in bench.queries]


async def _overhead(bench: Bench, rig: Rig) -> Measured:
    """One query at a time: the client's wall time minus what the engine took."""
    connection = await http_client.Connection.open(rig.address)
    wall_ms: list[float] = []
    over_ms: list[float] = []
    requests = _single_requests(bench)
    for number in range(bench.sizes.http_queries + 10):
        answer = await connection.send(requests[number % len(requests)])
        if number >= 10:
            wall_ms.append(answer.seconds * 1000)
            over_ms.append(wall_ms[-1] - float(answer.header(b"x-inference-time")))
    connection.close()
    return Measured(
        median(over_ms),
        {
            "wall_p50_ms": round(median(wall_ms), 3),
            "wall_p99_ms": round(quantile(wall_ms, 0.99), 3),
            "overhead_p99_ms": round(quantile(over_ms, 0.99), 3),
        },
    )


async def _singles(bench: Bench, rig: Rig) -> Measured:
    """Queries of one text, 32 at once."""
    rates: list[float] = []
    took: list[float] = []
    before = rig.snapshot()
    for _ in range(min(3, bench.sizes.repetitions)):
        took = await _send_for(rig, _single_requests(bench), SINGLES_AT_ONCE, bench.sizes.single_s)
        rates.append(len(took) / bench.sizes.single_s)
    used = rig.snapshot().cpu_since(before)
    requests = sum(rates) * bench.sizes.single_s
    return Measured(
        median(rates),
        {
            "requests_per_s": rounded(rates, 1),
            "p50_ms": round(median(took) * 1000, 1),
            "p99_ms": round(quantile(took, 0.99) * 1000, 1),
            "cpu_us_per_request": {
                name: round(used / requests * 1e6) for name, used in used.items()
            },
        },
    )


async def _send_for(
    rig: Rig, requests: Sequence[bytes], at_once: int, seconds: float
) -> list[float]:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, stop.set)
    return await http_client.send_for(rig.address, requests, at_once, stop)


@asynccontextmanager
async def _saturated_by_bulk(rig: Rig, feeder: Child, name: str) -> AsyncIterator[None]:
    """Endless passages on their way into a collection while the context lasts.

    Where it ends in an error, they end with the feeder.
    """
    await rig.client.create_collection(name)
    steps = (await rig.worker_status())["steps"]
    feeder.tell("ingest", collection=name, first=0, count=ENDLESS, blocks=SATURATING_BLOCKS)
    while (await rig.worker_status())["steps"] < steps + 20:
        await asyncio.sleep(0.1)
    yield
    feeder.tell("stop")
    await feeder.answer()
    await rig.client.delete_collection(name)


async def query_under_bulk(bench: Bench, rig: Rig, feeder: Child) -> tuple[list[float], float]:
    """What lone queries took while bulk saturates the engine, and the median bulk step, both ms."""
    requests = _single_requests(bench)
    connection = await http_client.Connection.open(rig.address)
    took_ms: list[float] = []
    async with _saturated_by_bulk(rig, feeder, "interactive"):
        for number in range(bench.sizes.interactive_queries):
            answer = await connection.send(requests[number % len(requests)])
            took_ms.append(answer.seconds * 1000)
        step_ms = (await rig.fresh_worker_status("steps"))["bulk_step_p50_ms"]
    connection.close()
    return took_ms, step_ms


async def _interactive(bench: Bench, rig: Rig, feeder: Child) -> Measured:
    """How many bulk steps a lone query waits."""
    took_ms, step_ms = await query_under_bulk(bench, rig, feeder)
    p99_ms = quantile(took_ms, 0.99)
    return Measured(
        (p99_ms - WAIT_ALLOWED_MS) / step_ms,
        {
            "p50_ms": round(median(took_ms), 1),
            "p99_ms": round(p99_ms, 1),
            "bulk_step_p50_ms": step_ms,
            "most_step_ms": MAX_STEP_MS,
        },
        also=step_ms <= MAX_STEP_MS,
    )


async def _bulk_share(bench: Bench, rig: Rig, feeder: Child) -> Measured:
    """Bulk's part of the tokens that the engine computes while queries saturate it."""
    stop = asyncio.Event()
    async with _saturated_by_bulk(rig, feeder, "share"):
        queries = asyncio.create_task(
            http_client.send_for(rig.address, _single_requests(bench), SATURATING_QUERIES, stop)
        )
        await asyncio.sleep(2)
        first = await rig.fresh_worker_status("tokens")
        await asyncio.sleep(bench.sizes.share_s)
        last = await rig.fresh_worker_status("tokens")
        stop.set()
        took = await queries
    tokens = last["tokens"] - first["tokens"]
    bulk = last["bulk_tokens"] - first["bulk_tokens"]
    return Measured(
        bulk / tokens,
        {
            "tokens": int(tokens),
            "bulk_tokens": int(bulk),
            "queries_at_once": SATURATING_QUERIES,
            "queries": len(took),
            "query_p50_ms": round(median(took) * 1000, 1),
        },
    )
