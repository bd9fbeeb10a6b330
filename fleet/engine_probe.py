"""One engine in a process of its own, measured: ``python -m vecfleet.fleet.engine_probe < task``.

A process each, so that memory is that engine's alone. The task and the figures are JSON; vectors
or scores, which are many, go to a file. Nothing else is written to standard output.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from vecfleet.common.errors import ConfigError, EngineFailed, VecfleetError
from vecfleet.fleet.process import dies_with_parent, kill_family, marked
from vecfleet.worker.engine import Engine, Priority
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.engines import load_engine
from vecfleet.worker.machine import read_gpus

WARM_UP_ITEMS = 64
GOLDEN_RATIO = 0.618  # its multiples spread evenly over 0 to 1
_STDERR_TAIL = 1500


@dataclass(frozen=True, slots=True)
class ProbeTask:
    """What to run: ``texts`` are embedded, or ``pairs`` scored."""

    settings: dict[str, Any]  # fields of EngineSettings
    texts: list[str] = field(default_factory=list)
    pairs: list[tuple[str, str]] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)  # asked one by one while bulk runs
    rounds: int = 2  # over all items; the fastest counts, as other processes only slow one down


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured. Memory counts the engine's own child processes too."""

    card: dict[str, Any]
    device: str
    start_s: float  # from the start of the process to the model's being ready
    rss_loaded_bytes: int
    rss_bytes: int  # after the work, allocators' caches included
    gpu_bytes: int | None  # None without a GPU
    items: int
    tokens: int
    seconds: float  # of the fastest round
    step_p50_s: float
    query_p50_s: float | None  # a query's wait and work while bulk runs; None: none was asked

    @property
    def items_per_s(self) -> float:
        """Texts or pairs a second."""
        return self.items / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, padding left out."""
        return self.tokens / self.seconds

    @property
    def memory_bytes(self) -> int:
        """Of the GPU where there is one, else of the process."""
        return self.rss_bytes if self.gpu_bytes is None else self.gpu_bytes


def probe(task: ProbeTask) -> tuple[Figures, np.ndarray[Any, np.dtype[np.float32]]]:
    """Run ``task`` in a new process; its figures, and vectors (n, d) or scores (n,).

    Raises ``ConfigError`` where the settings do not go together, ``EngineFailed`` where the process
    ends otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="vecfleet-probe-") as folder:
        rows = Path(folder) / "rows.npy"
        environment, mark = marked(None)
        try:
            done = subprocess.run(
                [sys.executable, "-m", "vecfleet.fleet.engine_probe", str(rows)],
                input=json.dumps(asdict(task)),
                capture_output=True,
                text=True,
                errors="replace",
                env=environment,
                preexec_fn=dies_with_parent(),
            )
        finally:
            kill_family(mark)  # an engine's own processes, where it could not end them
        told = _parsed(done.stdout)
        if "error" in told:
            kind = ConfigError if told["is_config"] else EngineFailed
            raise kind(told["error"])
        if done.returncode or not told:
            raise EngineFailed(f"the engine's process ended:\n{done.stderr[-_STDERR_TAIL:]}")
        return Figures(**told), np.load(rows)


async def measure(task: ProbeTask, rows: Path) -> Figures:
    """Run ``task`` in this process and write vectors or scores to ``rows``."""
    free_before = _free_gpu_bytes()
    # Else vLLM would fill its share of a GPU, and all settings would seem to need as much.
    engine = await load_engine(replace(EngineSettings(**task.settings), least_kv_cache=True))
    try:
        start_s = time.time() - psutil.Process().create_time()
        loaded = rss_bytes()
        items: Sequence[Any] = task.pairs or task.texts
        await _run(engine, task, items[:WARM_UP_ITEMS])
        took = []
        for _ in range(task.rounds):
            began = time.perf_counter()
            values, tokens = await _run(engine, task, items)
            took.append(time.perf_counter() - began)
        step_p50_s = engine.stats.bulk_step_p50_s
        query_p50_s = await _ask_under_bulk(engine, task, items) if task.queries else None
        np.save(rows, values)
        free_after = _free_gpu_bytes()
        return Figures(
            card=engine.card.to_wire(),
            device=engine.device,
            start_s=start_s,
            rss_loaded_bytes=loaded,
            rss_bytes=rss_bytes(),
            gpu_bytes=None if engine.device == "cpu" else max(0, free_before - free_after),
            items=len(items),
            tokens=tokens,
            seconds=min(took),
            step_p50_s=step_p50_s,
            query_p50_s=query_p50_s,
        )
    finally:
        await engine.close()


def rss_bytes() -> int:
    """Resident memory of this process and its children."""
    here = psutil.Process()
    return sum(process.memory_info().rss for process in (here, *here.children(recursive=True)))


async def _run(engine: Engine, task: ProbeTask, items: Sequence[Any]) -> tuple[Any, int]:
    """Vectors or scores of ``items``, in one bulk call, and their tokens."""
    if task.pairs:
        scored = await engine.rerank([(q, d) for q, d in items], priority=Priority.BULK)
        return scored.scores, int(scored.tokens.sum())
    embedded = await engine.embed(items, priority=Priority.BULK)
    return embedded.vectors, int(embedded.tokens.sum())


async def _ask_under_bulk(engine: Engine, task: ProbeTask, items: Sequence[Any]) -> float:
    """The median time of a query while a bulk call runs.

    Queries come at times spread over one to two steps: one after the other, they would keep nine
    tenths of the engine, and hardly ever meet a bulk step.
    """
    step_s = engine.stats.bulk_step_p50_s
    bulk = asyncio.create_task(_run(engine, task, items))
    waits: list[float] = []
    try:
        while not waits or not bulk.done():
            query = task.queries[len(waits) % len(task.queries)]
            began = time.perf_counter()
            if task.pairs:
                await engine.rerank([(query, items[0][1])], priority=Priority.INTERACTIVE)
            else:
                await engine.embed([query], priority=Priority.INTERACTIVE)
            waits.append(time.perf_counter() - began)
            await asyncio.sleep(step_s * (1 + len(waits) * GOLDEN_RATIO % 1))
    finally:
        await bulk
    return float(np.median(waits))


def _free_gpu_bytes() -> int:
    return sum(gpu.free_bytes for gpu in read_gpus())


def _parsed(text: str) -> dict[str, Any]:
    """The last line that is a JSON object; libraries may print before it."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    return {}


def main() -> None:
    """Read the task, measure, write the figures or the error."""
    task = ProbeTask(**json.load(sys.stdin))
    try:
        told = asdict(asyncio.run(measure(task, Path(sys.argv[1]))))
    except VecfleetError as error:
        told = {"error": error.message, "is_config": isinstance(error, ConfigError)}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
