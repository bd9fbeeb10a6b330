"""What a search pays for the writing that goes on beside it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

from vecfleet.bench.child import Child
from vecfleet.bench.context import Bench
from vecfleet.bench.null_pipeline import ingest, warm_up
from vecfleet.bench.rig import Rig
from vecfleet.bench.stats import median, quantile, rounded
from vecfleet.bench.targets import Measured
from vecfleet.common.collection import Collection

ROUNDS = 3
TOP_K = 10


async def measure(bench: Bench, keys: set[str]) -> dict[str, Measured]:
    """``search_p99_ratio``: idle and busy phases in turns over a collection of one size.

    In a busy phase known documents come again at full rate, so that the number of living documents
    stays and there is as much to compact as the ingest brings.
    """
    idle: list[list[float]] = []
    busy: list[list[float]] = []
    rates: list[float] = []
    count = bench.sizes.null_documents
    async with bench.rig("null") as rig, rig.feeder(bench.pool("pieces")) as feeder:
        await warm_up(rig, feeder)
        collection = await rig.client.create_collection("searched")
        await ingest(rig, feeder, collection, count)
        stats = await rig.until_calm(collection)
        queries = [(await rig.client.embed([query])).vectors for query in bench.queries[:200]]
        await _search(rig, collection, queries, bench.sizes.searches // 5)
        for number in range(min(ROUNDS, bench.sizes.repetitions)):
            idle.append(await _search(rig, collection, queries, bench.sizes.searches))
            took, rate = await _while_ingesting(rig, feeder, collection, queries, count, number + 1)
            busy.append(took)
            rates.append(rate)
            await rig.until_calm(collection)
            bench.say(
                f"search p99, round {number + 1}: {quantile(idle[-1], 0.99):.1f} ms idle, "
                f"{quantile(took, 0.99):.1f} ms busy"
            )
    ratios = [quantile(b, 0.99) / quantile(i, 0.99) for b, i in zip(busy, idle, strict=True)]
    return {
        "search_p99_ratio": Measured(
            median(ratios),
            {
                "ratios": rounded(ratios),
                "idle_p50_p99_ms": [rounded((median(t), quantile(t, 0.99)), 2) for t in idle],
                "busy_p50_p99_ms": [rounded((median(t), quantile(t, 0.99)), 2) for t in busy],
                "searches_while_busy": [len(took) for took in busy],
                "ingest_docs_per_s": rounded(rates, 0),
                "documents": stats["documents"],
                "indexed": stats["indexed"],
            },
        )
    }


async def _search(
    rig: Rig, collection: Collection, queries: Sequence[bytes], count: int
) -> list[float]:
    """Milliseconds as the caller sees them, one search after the other."""
    took_ms = []
    for query in random.Random(1).choices(queries, k=count):
        began = time.perf_counter()
        await rig.client.search(collection, query, top_k=TOP_K)
        took_ms.append((time.perf_counter() - began) * 1000)
    return took_ms


async def _while_ingesting(
    rig: Rig,
    feeder: Child,
    collection: Collection,
    queries: Sequence[bytes],
    count: int,
    first: int,
) -> tuple[list[float], float]:
    """Searches while every document of the collection gets another text, and is compacted."""
    feeder.tell("ingest", collection=collection.name, first=first, count=count, blocks=None)
    waiting = asyncio.create_task(feeder.answer())
    took_ms: list[float] = []
    while not waiting.done():
        took_ms += await _search(rig, collection, queries, 20)
    answer = await waiting
    return took_ms, answer["documents"] / answer["seconds"]
