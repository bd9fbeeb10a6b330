"""Processes that were frozen past their lease, and machines whose clock is wrong, do no harm."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import sys
from pathlib import Path

import msgpack
import pytest
from servers import Process, eventually

from vecfleet.common import keys
from vecfleet.common.document import cut_blocks, parse_document
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.redis_client import connect_async

ROLE = Path(__file__).parent.parent / "odd_role.py"
LEASE_S = 1.0
HOUR_S = 3600


class Fleet:
    """Roles as processes with short leases; each may live in another time."""

    def __init__(self, url: str, data: Path) -> None:
        self.url, self.data = url, data
        self.processes: list[Process] = []

    def start(self, role, *, step_s=0.0, skew_s=0, wait=True) -> Process:
        arguments = [ROLE, LEASE_S, skew_s, role, self.url, self.data, step_s]
        process = Process([sys.executable, *map(str, arguments)])
        self.processes.append(process)
        if wait:
            process.wait_for_line(f"{role} ready")
        return process

    def client(self) -> FleetClient:
        return FleetClient(connect_async(self.url), timeout_s=30)

    def close(self) -> None:
        for process in self.processes:
            process.close()


@pytest.fixture
def fleet(redis_server_factory, tmp_path):
    made = Fleet(redis_server_factory().url, tmp_path / "data")
    yield made
    made.close()


def rows(prefix: str, count: int):
    return [parse_document({"id": f"{prefix}/{n}", "text": f"{prefix} {n}"}) for n in range(count)]


async def submit(client, collection, name, documents, size=256):
    await client.submissions.open(name, tenant="-", collection=collection.name, uid=collection.uid)
    parts = [documents[start : start + size] for start in range(0, len(documents), size)]
    for place, part in enumerate(parts):
        (block,) = cut_blocks(part)
        await client.enqueue_block(collection, block, submission=name, place=place)
    await client.submissions.close(name, blocks=len(parts), documents=len(documents))


async def done(client, name):
    async def is_done():
        return (await client.submissions.get(name)).state == "done"

    await eventually(is_done, 60, f"submission {name}")
    return await client.submissions.get(name)


async def test_a_worker_that_wakes_up_late_settles_nothing(fleet):
    fleet.start("aggregator")
    fleet.start("search")
    sleeper = fleet.start("worker", step_s=0.05)
    async with fleet.client() as client:
        collection = await client.create_collection("c", model="fake")
        await submit(client, collection, "s", rows("a", 600))
        queue = keys.embed_queue(collection.spec.space, "bulk")

        async def claimed():
            return await client.redis.zcard(keys.lease(queue)) > 0

        await eventually(claimed)
        sleeper.signal(signal.SIGSTOP)
        other = await asyncio.to_thread(fleet.start, "worker")
        state = await done(client, "s")
        assert (state.committed, state.failed) == (600, 0)
        assert "rescued" in other.output
        before = len(sleeper.lines)
        sleeper.signal(signal.SIGCONT)
        # It finishes what it had in hand, and is told that it is not its own any more; or its
        # heartbeat learns so first, and it drops the work.
        await asyncio.to_thread(other.stop)
        await submit(client, collection, "t", rows("b", 50))
        state = await done(client, "t")
        assert state.committed == 50, sleeper.lines[before:]
        assert (await client.submissions.get("s")).committed == 600
        assert (await client.collection_stats(collection))["documents"] == 650
        assert await client.redis.keys("rq:job:*") == []


async def test_a_frozen_aggregator_cannot_publish_after_another_took_over(fleet):
    fleet.start("search")
    frozen = fleet.start("aggregator")
    worker = fleet.start("worker")
    async with fleet.client() as client:
        collection = await client.create_collection("c", model="fake")
        await submit(client, collection, "s", rows("a", 300))
        await done(client, "s")
        first_token = token(fleet, collection)
        frozen.signal(signal.SIGSTOP)
        await submit(client, collection, "t", rows("b", 2000), size=20)
        heir = await asyncio.to_thread(fleet.start, "aggregator")
        frozen.signal(signal.SIGCONT)  # both run now, and the queue is full of shards
        assert await asyncio.to_thread(frozen.wait, 30) == 1
        state = await done(client, "t")
        assert (state.committed, state.failed) == (2000, 0)
        assert token(fleet, collection) > first_token
        assert (await client.collection_stats(collection))["documents"] == 2300
        made = await client.create_collection("d", model="fake")
        assert await client.collection("d") == made
        assert heir.running() and worker.running()


def token(fleet, collection) -> int:
    path = fleet.data / "index" / collection.uid / "0" / "manifest.db"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as manifest:
        (record,) = manifest.execute("SELECT record FROM state").fetchone()
    return int(msgpack.unpackb(record[4:])["token"])  # behind its checksum


async def test_wrong_clocks_change_nothing(fleet):
    fleet.start("aggregator", skew_s=400 * 24 * HOUR_S)
    fleet.start("search", skew_s=-HOUR_S)
    ahead = fleet.start("worker", skew_s=HOUR_S, step_s=0.1)
    behind = fleet.start("worker", skew_s=-HOUR_S, step_s=0.1)
    async with fleet.client() as client:
        collection = await client.create_collection("c", model="fake")
        # All blocks together take longer than a lease: it is renewed, and nobody takes them over.
        await submit(client, collection, "s", rows("a", 3000), size=100)
        state = await done(client, "s")
        assert (state.committed, state.failed) == (3000, 0)
        assert "rescued" not in ahead.output + behind.output
        assert len(await client.embed(["a question"])) == 1

        # A dead one's jobs are taken over by one whose clock says that they have long expired,
        # or not begun.
        await submit(client, collection, "t", rows("b", 200), size=20)

        async def both_busy():
            queue = keys.embed_queue(collection.spec.space, "bulk")
            return await client.redis.zcard(keys.lease(queue)) >= 4

        await eventually(both_busy)
        ahead.kill()
        state = await done(client, "t")
        assert (state.committed, state.failed) == (200, 0)
        assert (await client.collection_stats(collection))["documents"] == 3200
        assert await client.redis.zcard(keys.outstanding(collection.uid)) == 0
