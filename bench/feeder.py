"""The producer's process: ``python -m vecfleet.bench.feeder REDIS_URL TEXTS``."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vecfleet.bench import texts
from vecfleet.bench.child import serve
from vecfleet.common.document import Block, cut_blocks, parse_document
from vecfleet.common.fleet_client import FleetClient, block_job_id
from vecfleet.common.names import new_id
from vecfleet.common.redis_client import connect_async


class Feeder:
    """Ingests documents made of the texts of one file."""

    def __init__(self, client: FleetClient, pool: list[str]) -> None:
        self._client = client
        self._texts = pool
        self._stopped = False

    def stop(self) -> None:
        """Take no more documents; what is in flight is finished."""
        self._stopped = True

    async def ingest(self, command: dict[str, Any]) -> dict[str, Any]:
        """Documents ``start`` to ``start + count`` into ``collection``, until all are committed."""
        self._stopped = False
        collection = await self._client.collection(command["collection"])
        rows = texts.rows_of(self._texts, "doc", command["start"], command["count"])
        submission = new_id()
        cpu_before, began = time.process_time(), time.perf_counter()
        await self._client.submissions.open(
            submission, tenant="-", collection=collection.name, uid=collection.uid
        )
        room = asyncio.Semaphore(command["window"])
        tasks: set[asyncio.Task[None]] = set()

        async def send(place: int, block: Block) -> None:
            job_id = block_job_id(submission, place)
            settled = self._client.box.expect(job_id)
            await self._client.enqueue_block(
                collection, block, submission=submission, place=place, answered=True
            )
            await settled
            room.release()

        documents = blocks = 0
        for place, block in enumerate(cut_blocks(map(parse_document, self._until_stopped(rows)))):
            await room.acquire()
            task = asyncio.create_task(send(place, block))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            documents, blocks = documents + len(block), blocks + 1
        await self._client.submissions.close(submission, blocks=blocks, documents=documents)
        await asyncio.gather(*tasks)
        seconds = time.perf_counter() - began
        state = (await self._client.submissions.get(submission)).state
        return {
            "documents": documents,
            "seconds": seconds,
            "cpu_s": time.process_time() - cpu_before,
            "state": state,
        }

    def _until_stopped(self, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            if self._stopped:
                return
            yield row


async def main(redis_url: str, path: str) -> None:
    """Serve the parent's commands."""
    async with FleetClient(connect_async(redis_url)) as client:
        feeder = Feeder(client, texts.load(Path(path)))
        await serve({"ingest": feeder.ingest}, on_stop=feeder.stop)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
