"""The engine alone on texts and pairs: ``python -m vecfleet.bench.gpu_bare SETTINGS FOLDER``.

``SETTINGS`` are the fields of ``EngineSettings`` as JSON; ``FOLDER`` holds the texts. The engine is
loaded as a worker loads it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np

from vecfleet.bench.child import answers_apart, serve
from vecfleet.bench.gpu_flops import Work
from vecfleet.common.logs import setup_logging
from vecfleet.worker.engine import Embeddings, Engine, Priority, Scores
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.engines import load_engine

_TEXTS_A_CALL = 4096
_CALLS_AT_ONCE = 3  # the engine never waits for the next call

T = TypeVar("T")


class Bare:
    """Gives an engine all it can take."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self._pools: dict[str, list[Any]] = {}

    async def ready(self, command: dict[str, Any]) -> dict[str, Any]:
        """What was loaded."""
        card = self._engine.card
        return {
            "engine": card.engine,
            "dtype": card.dtype,
            "device": self._engine.device,
            "settings": card.settings,
        }

    async def embed(self, command: dict[str, Any]) -> dict[str, Any]:
        """``count`` texts of the file ``pool``, from ``first`` on and round again."""
        texts = self._taken(command)
        return await self._measure(
            texts, lambda part: self._engine.embed(part, priority=Priority.BULK)
        )

    async def rerank(self, command: dict[str, Any]) -> dict[str, Any]:
        """The same for pairs."""
        pairs = [(query, document) for query, document in self._taken(command)]
        return await self._measure(
            pairs, lambda part: self._engine.rerank(part, priority=Priority.BULK)
        )

    def _taken(self, command: dict[str, Any]) -> list[Any]:
        name = command["pool"]
        if name not in self._pools:
            self._pools[name] = json.loads((self._folder / f"{name}.json").read_text())
        pool = self._pools[name]
        first = command["first"]
        return [pool[(first + number) % len(pool)] for number in range(command["count"])]

    async def _measure(
        self, rows: Sequence[T], run: Callable[[Sequence[T]], Awaitable[Embeddings | Scores]]
    ) -> dict[str, Any]:
        turn = asyncio.Semaphore(_CALLS_AT_ONCE)

        async def call(first: int) -> Embeddings | Scores:
            async with turn:
                return await run(rows[first : first + _TEXTS_A_CALL])

        before, began = self._engine.stats, time.perf_counter()
        done = await asyncio.gather(*(call(first) for first in range(0, len(rows), _TEXTS_A_CALL)))
        seconds, after = time.perf_counter() - began, self._engine.stats
        lengths = np.concatenate([part.tokens for part in done]).tolist()
        work = Work.of(lengths, computed=after.tokens - before.tokens)
        return {
            "texts": len(rows),
            "seconds": seconds,
            "tokens": sum(lengths),
            "computed": work.tokens,
            "attended": work.attended,
            "busy_s": after.busy_s - before.busy_s,
            "steps": after.steps - before.steps,
            "bulk_step_p50_ms": after.bulk_step_p50_s * 1000,
        }


async def main(answers: TextIO, settings: str, folder: str) -> None:
    """Serve the parent's commands."""
    engine = await load_engine(EngineSettings(**json.loads(settings)))
    try:
        bare = Bare(engine, Path(folder))
        handlers = {"ready": bare.ready, "embed": bare.embed, "rerank": bare.rerank}
        await serve(handlers, answers=answers)
    finally:
        await engine.close()


if __name__ == "__main__":
    apart = answers_apart()
    setup_logging()
    asyncio.run(main(apart, *sys.argv[1:]))
