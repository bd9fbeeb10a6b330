"""The engine alone: ``python -m vecfleet.bench.bare_engine MODEL TEXTS [ENGINE]``.

It is loaded as a worker loads it, with the same settings of the process.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np

from vecfleet.bench import texts
from vecfleet.bench.child import answers_apart, serve
from vecfleet.common.engine_names import EngineName
from vecfleet.worker.engine import Priority
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.engines import load_engine


async def main(model: str, path: str, engine_name: str = "auto") -> None:
    """Serve the parent's commands."""
    answers = answers_apart()
    engine = await load_engine(EngineSettings(model, cast(EngineName, engine_name)))
    pool = texts.load(Path(path))

    async def embed(command: dict[str, Any]) -> dict[str, Any]:
        """All texts in one call; their vectors go to the file ``save`` where one is named."""
        began = time.perf_counter()
        result = await engine.embed(pool, priority=Priority.BULK)
        seconds = time.perf_counter() - began
        if "save" in command:
            np.save(command["save"], result.vectors)
        return {"texts": len(pool), "tokens": int(result.tokens.sum()), "seconds": seconds}

    await serve({"embed": embed}, answers=answers)
    await engine.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
