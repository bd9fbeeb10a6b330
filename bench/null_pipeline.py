"""How fast documents go through everything around the engine."""

from __future__ import annotations

from typing import Any

from vecfleet.bench.child import Child
from vecfleet.bench.context import Bench
from vecfleet.bench.rig import Rig
from vecfleet.bench.stats import median, microseconds_each, rounded
from vecfleet.bench.targets import Measured
from vecfleet.common.collection import Collection


async def measure(bench: Bench, keys: set[str]) -> dict[str, Measured]:
    """``null_engine_docs_per_s``: from the producer's start to the submission being done.

    Each repetition fills a new collection; the texts are in the producer's memory beforehand.
    """
    rates: list[float] = []
    costs: list[dict[str, float]] = []
    async with bench.rig("null") as rig, rig.feeder(bench.pool("pieces")) as feeder:
        await warm_up(rig, feeder)
        for repetition in range(bench.sizes.null_repetitions):
            collection = await rig.client.create_collection(f"null-{repetition}")
            fed = await ingest(rig, feeder, collection, bench.sizes.null_documents)
            rates.append(fed["documents"] / fed["seconds"])
            costs.append(fed["cpu_us_per_document"])
            bench.say(f"null engine: {rates[-1]:,.0f} docs/s")
            await rig.client.delete_collection(collection.name)
    detail = {
        "docs_per_s": rounded(rates, 0),
        "cpu_us_per_document": {
            name: round(median(cost[name] for cost in costs), 2) for name in costs[0]
        },
    }
    return {"null_engine_docs_per_s": Measured(median(rates), detail)}


async def warm_up(rig: Rig, feeder: Child) -> None:
    """Let every process load its code and open its connections."""
    collection = await rig.client.create_collection("warm-up")
    await ingest(rig, feeder, collection, 2000)
    await rig.client.delete_collection("warm-up")


async def ingest(rig: Rig, feeder: Child, collection: Collection, count: int) -> dict[str, Any]:
    """One submission with the producer's own limits, and what each process paid for it."""
    before = rig.snapshot()
    fed = await feeder.ask("ingest", collection=collection.name, first=0, count=count, blocks=None)
    used = rig.snapshot().cpu_since(before)
    costs = microseconds_each({"producer": fed["cpu_s"], **used}, fed["documents"])
    costs["all"] = round(sum(costs.values()), 2)
    return {**fed, "cpu_us_per_document": costs}
