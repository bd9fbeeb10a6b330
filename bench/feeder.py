"""The producer's process: ``python -m vecfleet.bench.feeder REDIS_URL TEXTS``."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

from vecfleet.bench import texts
from vecfleet.bench.child import serve
from vecfleet.producer import AsyncProducer, SubmitOptions


class Feeder:
    """Ingests documents made of the texts of one file."""

    def __init__(self, producer: AsyncProducer, pool: list[str]) -> None:
        self._producer = producer
        self._texts = pool
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Take no more documents; what is in flight is finished."""
        self._stop.set()

    async def ingest(self, command: dict[str, Any]) -> dict[str, Any]:
        """``count`` documents into ``collection``, until all are committed.

        Their texts begin at ``first`` in the file; ``blocks`` may be in flight, None for the
        producer's own limit.
        """
        self._stop.clear()
        rows = texts.rows_of(self._texts, "doc", command["first"], command["count"])
        limits = {} if command["blocks"] is None else {"max_blocks": command["blocks"]}
        cpu_before, began = time.process_time(), time.perf_counter()
        result = await self._producer.submit(
            rows,
            collection=command["collection"],
            options=SubmitOptions(**limits),
            stop=self._stop,
        )
        return {
            "documents": result.committed,
            "seconds": time.perf_counter() - began,
            "cpu_s": time.process_time() - cpu_before,
        }


async def main(redis_url: str, path: str) -> None:
    """Serve the parent's commands."""
    async with AsyncProducer(redis_url) as producer:
        feeder = Feeder(producer, texts.load(Path(path)))
        await serve({"ingest": feeder.ingest}, on_stop=feeder.stop)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
