"""A million documents: does memory stay flat, does the rate hold?"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vecfleet.bench.context import Bench
from vecfleet.bench.null_pipeline import ingest, warm_up
from vecfleet.bench.rig import Rig
from vecfleet.bench.stats import microseconds_each
from vecfleet.bench.targets import Measured
from vecfleet.common.collection import Collection

SAMPLE_S = 0.25
FIRST_SHARE = 0.1  # of the documents: where growth is counted from
EARLY, LATE = (0.05, 0.2), (0.85, 1.0)  # what speaks for 100k and 1M: as many samples in each
AGGREGATOR_BYTES = 64  # a document
AGGREGATOR = "writer"
BUILDERS = "builders"
CHILDREN = (BUILDERS, "redis_rewrites")  # they come and go
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    documents: int  # committed
    anon_bytes: dict[str, int]


async def measure(bench: Bench, keys: set[str]) -> dict[str, Measured]:
    """``anon_memory_growth`` and ``ingest_flatness``, from one run with the default policy."""
    count = bench.sizes.growth_documents
    async with bench.rig("null") as rig, rig.feeder(bench.pool("pieces")) as feeder:
        await warm_up(rig, feeder)
        collection = await rig.client.create_collection("million")
        before = rig.snapshot()
        samples = [_Sample(0.0, 0, await _memory_of(rig))]
        sampling = asyncio.create_task(_sample(rig, collection, samples))
        fed = await ingest(rig, feeder, collection, count)
        stats = await rig.until_calm(collection)
        sampling.cancel()
        with suppress(asyncio.CancelledError):
            await sampling
        used = microseconds_each(rig.snapshot().cpu_since(before), count)
    samples.append(_Sample(samples[-1].at_s, stats["documents"], samples[-1].anon_bytes))
    about: dict[str, Any] = {
        "documents": stats["documents"],
        "indexed": stats["indexed"],
        "segments": stats["segments"],
        "docs_per_s": round(fed["documents"] / fed["seconds"]),
        "cpu_us_per_document": {**used, "producer": fed["cpu_us_per_document"]["producer"]},
    }
    return {
        "anon_memory_growth": _memory(samples, count, about),
        "ingest_flatness": _flatness(samples, count, about),
    }


async def _sample(rig: Rig, collection: Collection, samples: list[_Sample]) -> None:
    began = time.perf_counter()
    while True:
        documents = (await rig.client.collection_stats(collection))["documents"]
        samples.append(_Sample(time.perf_counter() - began, documents, await _memory_of(rig)))
        await asyncio.sleep(SAMPLE_S)


async def _memory_of(rig: Rig) -> dict[str, int]:
    return {**rig.snapshot().anon_bytes, "redis_used": await rig.redis_memory()}


def _memory(samples: Sequence[_Sample], count: int, about: dict[str, Any]) -> Measured:
    """The largest growth of a process, the most that it held near each count compared."""
    early, late = _most_within(samples, EARLY, count), _most_within(samples, LATE, count)
    growth = {
        name: late[name] / early[name] - 1
        for name in early
        if name not in (*CHILDREN, AGGREGATOR) and early[name]
    }
    grown = late[AGGREGATOR] - early[AGGREGATOR]
    each = grown / (count * (1 - FIRST_SHARE))
    return Measured(
        max(growth.values()),
        {
            "growth": {name: round(value, 4) for name, value in growth.items()},
            "aggregator_bytes_per_document": round(each, 1),
            "most_aggregator_bytes_per_document": AGGREGATOR_BYTES,
            "anon_mib_at_a_tenth": _in_mib(early),
            "anon_mib_at_the_end": _in_mib(late),
            "builders_peak_mib": round(max(s.anon_bytes[BUILDERS] for s in samples) / _MIB, 1),
            **about,
        },
        also=each <= AGGREGATOR_BYTES,
    )


def _most_within(
    samples: Sequence[_Sample], shares: tuple[float, float], count: int
) -> dict[str, int]:
    low, high = (share * count for share in shares)
    near = [s for s in samples if low <= s.documents <= high]
    near = near or [min(samples, key=lambda s: abs(s.documents - high))]
    return {name: max(s.anon_bytes[name] for s in near) for name in near[0].anon_bytes}


def _in_mib(memory: dict[str, int]) -> dict[str, float]:
    return {name: round(used / _MIB, 1) for name, used in memory.items()}


def _flatness(samples: Sequence[_Sample], count: int, about: dict[str, Any]) -> Measured:
    """Documents a second in each tenth of the run, by when that many were committed."""
    times = [_when(samples, count * tenth / 10) for tenth in range(11)]
    rates = [count / 10 / (after - before) for before, after in itertools.pairwise(times)]
    return Measured(
        rates[-1] / rates[0], {"docs_per_s_by_tenth": [round(rate) for rate in rates], **about}
    )


def _when(samples: Sequence[_Sample], documents: float) -> float:
    """When so many were committed, between two samples in proportion."""
    before = samples[0]
    for sample in samples:
        if sample.documents > before.documents:
            if sample.documents >= documents:
                share = (documents - before.documents) / (sample.documents - before.documents)
                return before.at_s + max(0.0, share) * (sample.at_s - before.at_s)
            before = sample
    return samples[-1].at_s
