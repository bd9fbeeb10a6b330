"""The measurements of the bench on a GPU, one after the other."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vecfleet.bench.child import Child
from vecfleet.bench.gpu_fleet import MODEL, GpuFleet
from vecfleet.bench.gpu_flops import Cost, Work
from vecfleet.bench.gpu_meter import GpuMeter
from vecfleet.bench.gpu_report import Report
from vecfleet.bench.stats import median, quantile, rounded
from vecfleet.bench.worker_status import fresh_worker_status, worker_status

ENDLESS = 100_000_000  # documents; the feeder is told to stop
SATURATING_BLOCKS = 16  # more than a worker claims ahead, soon done when it ends
_STATUS_REST_S = 3.0  # a worker's heartbeat has come by then


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    passages: int = 6_000  # docstrings that all texts are made of
    vocabulary: int = 32_000  # of the tokenizer
    tokens_a_text: int = 128
    pool: int = 65_536  # different texts of that length
    pairs: int = 16_384
    documents_a_query: int = 16
    warm_up: int = 2_048  # texts, whose rate tells how many a run takes
    run_s: float = 12.0  # of a run
    repetitions: int = 3  # of bare engine and fleet in turns
    queries: int = 200  # in an idle fleet
    query_s: float = 10.0  # under bulk
    matmul: tuple[int, ...] = (4_096, 8_192, 16_384)
    tiny: bool = False  # models for a CPU


SMOKE = Sizes(
    passages=400,
    vocabulary=4_000,
    pool=512,
    pairs=64,
    warm_up=64,
    run_s=1.0,
    repetitions=1,
    queries=10,
    query_s=2.0,
    matmul=(256, 512),
    tiny=True,
)


@dataclass(slots=True)
class Run:
    """What all measurements share."""

    folder: Path
    sizes: Sizes
    report: Report
    meter: GpuMeter
    say: Callable[[str], None]
    ends_at: float  # of time.monotonic: nothing is repeated any more
    peak_flops: float = 0.0  # the measured matrix rate

    @property
    def text_folder(self) -> Path:
        """Where the texts lie."""
        return self.folder / "texts"

    @property
    def seconds_left(self) -> float:
        """Until ``ends_at``."""
        return self.ends_at - time.monotonic()


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of the bare engine."""

    rows: int
    seconds: float
    tokens: int
    work: Work
    busy: float
    detail: dict[str, Any]

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


async def run_bare(
    run: Run, bare: Child, do: str, pool: str, count: int, first: int = 0
) -> Measured:
    """Give the engine ``count`` rows of a pool, from ``first`` on."""
    began = time.monotonic()
    told = await bare.ask(do, pool=pool, first=first, count=count)
    seen = run.meter.between(began, time.monotonic())
    engine_busy = told["busy_s"] / told["seconds"]
    detail = {
        "rows": count,
        "seconds": round(told["seconds"], 2),
        "tokens": told["tokens"],
        "computed_tokens": told["computed"],
        "tokens_a_row": round(told["tokens"] / count, 1),
        "steps": told["steps"],
        "bulk_step_p50_ms": round(told["bulk_step_p50_ms"], 2),
        "engine_busy": round(engine_busy, 4),
        "gpu": seen,
    }
    work = Work(told["computed"], told["attended"])
    busy = seen.get("busy", engine_busy)
    return Measured(count, told["seconds"], told["tokens"], work, busy, detail)


async def warm_up(
    run: Run, bare: Child, do: str, pool: str, count: int, most: int, seconds: float
) -> int:
    """Run ``count`` rows, half and half, and return how many take ``seconds``, at most ``most``."""
    half = count // 2
    await run_bare(run, bare, do, pool, half)
    measured = await run_bare(run, bare, do, pool, half, first=half)
    return max(min(count, most), min(most, int(measured.rate * seconds)))


def tell_bare(run: Run, name: str, rows: str, measured: Measured, cost: Cost) -> None:
    """The figures of a run of the bare engine."""
    report, detail = run.report, measured.detail
    flops_per_s = cost.flops(measured.work) / measured.seconds
    report.figure(f"{name}_{rows}_per_s", measured.rate, **detail)
    report.figure(f"{name}_tokens_per_s", measured.tokens / measured.seconds)
    report.figure(
        f"{name}_rate_share", flops_per_s / run.peak_flops, tflops=round(flops_per_s / 1e12, 4)
    )
    run.say(
        f"{name}: {measured.rate:,.0f} {rows}/s, {measured.tokens / measured.seconds:,.0f} "
        f"tokens/s, {flops_per_s / run.peak_flops:.1%} of the matrix rate, "
        f"{measured.busy:.1%} busy, step {detail['bulk_step_p50_ms']:g} ms"
    )


def tell_busy(run: Run, key: str, busy: float, detail: dict[str, Any]) -> None:
    """How busy the GPU was; without NVML, the engine."""
    source = "nvml" if detail.get("gpu") else "engine"
    run.report.figure(key, busy, source=source, **detail)


async def measure_rerank(run: Run, bare: Child, cost: Cost, lengths: dict[str, float]) -> None:
    """Pairs a second; ``lengths`` are the mean tokens of queries and documents."""
    seconds = run.sizes.run_s
    # Pairs are measured once and not those of the warm-up: an engine may keep what it has read.
    warm = min(run.sizes.warm_up, run.sizes.pairs // 4)
    count = await warm_up(run, bare, "rerank", "pairs", warm, run.sizes.pairs - warm, seconds)
    measured = await run_bare(run, bare, "rerank", "pairs", count, first=warm)
    measured.detail.update(lengths)
    run.say(f"pairs: {lengths}, {measured.detail['tokens_a_row']:g} tokens with the prompt")
    tell_bare(run, "rerank", "pairs", measured, cost)
    tell_busy(run, "rerank_gpu_busy", measured.busy, {"gpu": measured.detail["gpu"]})


async def measure_embed(run: Run, bare: Child, cost: Cost) -> Measured:
    """The bare engine on passages of one length, and on docstrings as they are."""
    sizes = run.sizes
    count = await warm_up(
        run, bare, "embed", "passages", min(sizes.warm_up, sizes.pool), sizes.pool, sizes.run_s
    )
    measured = await run_bare(run, bare, "embed", "passages", count)
    tell_bare(run, "embed", "docs", measured, cost)
    tell_busy(run, "embed_gpu_busy", measured.busy, {"gpu": measured.detail["gpu"]})
    mixed = min(sizes.pool, max(sizes.warm_up, count // 2))
    tell_bare(run, "mixed", "docs", await run_bare(run, bare, "embed", "mixed", mixed), cost)
    return measured


class FleetRuns:
    """The fleet and the bare engine in turns, over the same passages."""

    def __init__(self, run: Run, fleet: GpuFleet, feeder: Child, bare: Child, cost: Cost) -> None:
        self._run = run
        self._fleet = fleet
        self._feeder = feeder
        self._bare = bare
        self._cost = cost
        self._runs = 0

    async def measure(self, first: Measured) -> None:
        """Efficiency, rate and how busy the GPU is; ``first`` was the bare engine's last run."""
        run, count = self._run, first.rows
        await self._ingest(min(count, run.sizes.warm_up))
        rates, ratios, busy, seen = [], [], [], {}
        before = first
        for number in range(run.sizes.repetitions):
            seconds, shares = await self._busy_run(count)
            rates.append(count / seconds)
            busy.append(shares["busy"])
            seen = shares
            after = await run_bare(run, self._bare, "embed", "passages", count)
            ratios.append(rates[-1] / math.sqrt(before.rate * after.rate))
            before = after
            self._tell(first, rates, ratios, busy, seen)
            run.say(
                f"fleet: {rates[-1]:,.0f} docs/s, {ratios[-1]:.3f} of the bare engine "
                f"({after.rate:,.0f}), {busy[-1]:.1%} busy"
            )
            if number + 1 < run.sizes.repetitions and run.seconds_left < 3 * seconds:
                run.say("no time is left to repeat it")
                break

    def _tell(
        self,
        bare: Measured,
        rates: list[float],
        ratios: list[float],
        busy: list[float],
        seen: dict[str, Any],
    ) -> None:
        report, rate = self._run.report, median(rates)
        flops_a_row = self._cost.flops(bare.work) / bare.rows
        share = rate * flops_a_row / self._run.peak_flops
        report.figure("fleet_docs_per_s", rate, rates=rounded(rates, 1), documents=bare.rows)
        report.figure("fleet_tokens_per_s", rate * bare.tokens / bare.rows)
        report.figure("fleet_rate_share", share)
        report.figure("fleet_efficiency", median(ratios), ratios=rounded(ratios))
        report.figure("fleet_gpu_busy", median(busy), runs=rounded(busy, 4), last=seen)

    async def _busy_run(self, count: int) -> tuple[float, dict[str, Any]]:
        before = await self._engine_busy_s()
        began = time.monotonic()
        seconds = await self._ingest(count)
        if self._run.meter.sees:
            seen = self._run.meter.between(began, time.monotonic())
            return seconds, {**seen, "source": "nvml"}
        busy_s = await self._engine_busy_s() - before
        return seconds, {"busy": busy_s / seconds, "source": "engine"}

    async def _engine_busy_s(self) -> float:
        if self._run.meter.sees:
            return 0.0  # not needed, and it takes a heartbeat to know
        await asyncio.sleep(_STATUS_REST_S)
        return (await worker_status(self._fleet.client.redis))["busy_s"]

    async def _ingest(self, count: int) -> float:
        self._runs += 1
        name = f"run-{self._runs}"
        await self._fleet.client.create_collection(name, model=MODEL)
        fed = await self._feeder.ask("ingest", collection=name, first=0, count=count, blocks=None)
        await self._fleet.client.delete_collection(name)
        return float(fed["seconds"])


async def measure_queries(run: Run, fleet: GpuFleet, feeder: Child, queries: list[str]) -> None:
    """One query after the other: in an idle fleet, and while bulk saturates the GPU."""
    report = run.report
    idle = await _ask_until(fleet, queries, lambda asked: asked >= run.sizes.queries)
    report.figure("query_idle_p50_ms", median(idle), p99_ms=round(quantile(idle, 0.99), 2))
    await fleet.client.create_collection("queries", model=MODEL)
    redis = fleet.client.redis
    steps = (await worker_status(redis))["steps"]
    feeder.tell("ingest", collection="queries", first=0, count=ENDLESS, blocks=SATURATING_BLOCKS)
    while (await worker_status(redis))["steps"] < steps + 20:
        await asyncio.sleep(0.1)
    first = await fresh_worker_status(redis, "steps")
    began = time.monotonic()
    took = await _ask_until(
        fleet, queries, lambda asked: time.monotonic() - began >= run.sizes.query_s and asked >= 5
    )
    seen = run.meter.between(began, time.monotonic())
    last = await fresh_worker_status(redis, "steps")
    seconds = time.monotonic() - began
    step_ms = last["bulk_step_p50_ms"]
    bulk = {
        "bulk_step_p50_ms": step_ms,
        "bulk_tokens_per_s": round((last["bulk_tokens"] - first["bulk_tokens"]) / seconds),
        "engine_busy": round((last["busy_s"] - first["busy_s"]) / seconds, 3),
    }
    feeder.tell("stop")
    await feeder.answer()
    await fleet.client.delete_collection("queries")
    p50, p99 = median(took), quantile(took, 0.99)
    report.figure("query_p50_ms", p50, queries=len(took), gpu=seen, **bulk)
    report.figure("query_p99_ms", p99)
    report.figure("query_p50_steps", p50 / step_ms, p99_steps=round(p99 / step_ms, 2))
    run.say(
        f"query: p50 {median(idle):.1f} ms idle; under bulk p50 {p50:.1f} ms, p99 {p99:.1f} ms, "
        f"a bulk step takes {step_ms:.1f} ms"
    )


async def _ask_until(
    fleet: GpuFleet, queries: list[str], done: Callable[[int], bool]
) -> list[float]:
    card = await fleet.client.find_model(MODEL, "embed")
    took: list[float] = []
    for number in range(5):  # opens connections
        await fleet.client.embed([queries[number % len(queries)]], model=card)
    while not done(len(took)):
        began = time.perf_counter()
        await fleet.client.embed([queries[len(took) % len(queries)]], model=card)
        took.append((time.perf_counter() - began) * 1000)
    return took


def bare_child(run: Run, name: str, settings: dict[str, Any]) -> Child:
    """An engine alone, in a process of its own."""
    log = run.folder / f"{name}.log"
    return Child("gpu_bare", log, json.dumps(settings), str(run.text_folder))


async def started(run: Run, name: str, child: Child) -> dict[str, Any]:
    """Wait for an engine; tells how long it took."""
    began = time.monotonic()
    told = await child.ask("ready")
    seconds = time.monotonic() - began
    run.say(f"{name}: {told['engine']} on {told['device']}, {told['dtype']}, {seconds:.1f} s")
    run.report.note("models", **{name: {**told, "start_s": round(seconds, 1)}})
    return told
