"""The engine alone, in a process of its own: ``python -m vecfleet.bench.bare_engine MODEL TEXTS``.

It is loaded as a worker loads it, with the same settings of the process.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

from vecfleet.bench import texts
from vecfleet.bench.child import serve
from vecfleet.worker.engine import Priority
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.engines import load_engine


async def main(model: str, path: str) -> None:
    """Serve the parent's commands."""
    engine = await load_engine(EngineSettings(model))
    pool = texts.load(Path(path))

    async def embed(command: dict[str, Any]) -> dict[str, Any]:
        """All texts in one call."""
        began = time.perf_counter()
        result = await engine.embed(pool, priority=Priority.BULK)
        seconds = time.perf_counter() - began
        return {"texts": len(pool), "tokens": int(result.tokens.sum()), "seconds": seconds}

    await serve({"embed": embed})
    await engine.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
