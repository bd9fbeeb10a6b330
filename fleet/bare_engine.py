"""The engine alone, without queue, gateway or index: what the fleet is measured against.

    python -m vecfleet.fleet.bare_engine < texts.json

Reads the fields of ``EngineSettings`` and ``"texts"`` from standard input, embeds all texts in one
call, and writes ``{"seconds", "texts", "tokens"}``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from vecfleet.worker.engine import Priority
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.engines import load_engine

_WARM_UP_TEXTS = 128


async def measure(options: EngineSettings, texts: list[str]) -> dict[str, Any]:
    """Embed ``texts`` in one call, after a warm-up."""
    engine = await load_engine(options)
    try:
        await engine.embed(texts[:_WARM_UP_TEXTS], priority=Priority.BULK)
        began = time.perf_counter()
        done = await engine.embed(texts, priority=Priority.BULK)
        seconds = time.perf_counter() - began
    finally:
        await engine.close()
    return {"seconds": seconds, "texts": len(texts), "tokens": int(done.tokens.sum())}


def main() -> None:
    """Read the task, measure, write the figures."""
    asked = json.load(sys.stdin)
    texts = asked.pop("texts")
    json.dump(asyncio.run(measure(EngineSettings(**asked), texts)), sys.stdout)


if __name__ == "__main__":
    main()
