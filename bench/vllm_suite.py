"""What the fleet adds to vLLM's CPU build, and how near its vectors are to transformers'."""

from __future__ import annotations

from contextlib import AsyncExitStack

import numpy as np

from vecfleet.bench.child import Child
from vecfleet.bench.context import Bench
from vecfleet.bench.real_engine import Ratios, query_under_bulk
from vecfleet.bench.stats import median, quantile
from vecfleet.bench.targets import Measured

_END_S = 30.0


async def measure(bench: Bench, keys: set[str]) -> dict[str, Measured]:
    """The figures that ``keys`` ask for, on one fleet with vLLM in its worker."""
    pool = bench.pool("passages")
    found: dict[str, Measured] = {}
    bare = Child("bare_engine", bench.folder / "bare.log", bench.model, str(pool), "vllm")
    async with AsyncExitStack() as stack:
        if keys - {"engine_agreement"}:
            rig = await stack.enter_async_context(bench.rig("vllm"))
            feeder = await stack.enter_async_context(rig.feeder(pool))
            if "vllm_interactive_ratio" in keys:
                found["vllm_interactive_ratio"] = _interactive(
                    *await query_under_bulk(bench, rig, feeder)
                )
        if keys - {"vllm_interactive_ratio"}:
            bench.say("starting vLLM alone")
            await stack.enter_async_context(bare)
            if "vllm_fleet_efficiency" in keys:
                found |= await Ratios(bench, rig, feeder, bare).measure(keys)
            if "engine_agreement" in keys:
                found["engine_agreement"] = await _agreement(bench, bare)
            await bare.finish(_END_S)
    return found


def _interactive(took_ms: list[float], step_ms: float) -> Measured:
    return Measured(
        median(took_ms) / step_ms,
        {
            "p50_ms": round(median(took_ms), 1),
            "p99_ms": round(quantile(took_ms, 0.99), 1),
            "bulk_step_p50_ms": step_ms,
        },
    )


async def _agreement(bench: Bench, bare: Child) -> Measured:
    """The least cosine over all passages, vLLM as a worker loads it."""
    ours, theirs = bench.folder / "vllm.npy", bench.folder / "transformers.npy"
    await bare.ask("embed", save=str(ours))
    pool = str(bench.pool("passages"))
    log = bench.folder / "plain.log"
    async with Child("plain_engine", log, bench.model, pool, "float32") as plain:
        await plain.ask("embed", save=str(theirs))
    cosines = np.einsum("nd,nd->n", np.load(ours), np.load(theirs))
    return Measured(
        float(cosines.min()), {"mean": round(float(cosines.mean()), 6), "texts": len(cosines)}
    )
