"""Processes that were frozen past their lease, and machines whose clock is wrong, do no harm."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import sys
import time
from pathlib import Path

import msgpack
import pytest
from servers import Process, eventually

from vecfleet.common import keys
from vecfleet.common.document import cut_blocks, parse_document
from vecfleet.common.errors import CollectionConflict
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.redis_client import connect, connect_async
from vecfleet.worker.ledger import Ask, Ledger

ROLE = Path(__file__).parent.parent / "odd_role.py"
LEASE_S = 1.0
HOUR_S = 3600


class Fleet:
    """Roles as processes with short leases; each may live in another time."""

    def __init__(self, url: str, data: Path) -> None:
        self.url, self.data = url, data
        self.lease_s = LEASE_S
        self.processes: list[Process] = []

    def start(self, role, *, step_s=0.0, skew_s=0, wait=True) -> Process:
        arguments = [ROLE, self.lease_s, skew_s, role, self.url, self.data, step_s]
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
    sleeper = fleet.start("worker", step_s=2.0)  # it is stopped long before it is done
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
        await asyncio.to_thread(other.wait_for_line, "rescued")
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


async def test_a_creation_that_comes_after_its_deletion_makes_nothing(fleet):
    """Its writer died with it in hand; whoever wanted it has asked again and thought better."""
    fleet.start("worker")
    catalog = keys.catalog_queue()
    async with fleet.client() as client:
        with connect(fleet.url) as redis:
            late = asyncio.create_task(client.create_collection("c", model="fake"))
            dead = Ledger(redis, "dead", lease_s=600)
            claimed = await eventually(lambda: dead.claim([Ask(catalog, 1, 9999)]))
            fleet.start("aggregator")
            await client.create_collection("c", model="fake")
            await client.delete_collection("c")
            late_lease = f"{claimed[0].id}:{claimed[0].execution}"
            redis.zadd(keys.lease(catalog), {late_lease: 1}, xx=True)  # it is over
            with pytest.raises(CollectionConflict, match="was deleted after this was asked for"):
                await late
        assert await client.collections() == []
        await client.create_collection("c", model="fake")
        assert [found.name for found in await client.collections()] == ["c"]


async def test_wrong_clocks_change_nothing(fleet):
    fleet.lease_s = 7.0  # a machine that stands still for a few seconds loses none
    fleet.start("aggregator", skew_s=400 * 24 * HOUR_S)
    fleet.start("search", skew_s=-HOUR_S)
    ahead = fleet.start("worker", skew_s=HOUR_S, step_s=0.12)
    behind = fleet.start("worker", skew_s=-HOUR_S, step_s=0.12)
    async with fleet.client() as client:
        collection = await client.create_collection("c", model="fake")
        # All blocks together take longer than a lease: it is renewed, and nobody takes them over.
        began = time.monotonic()
        await submit(client, collection, "s", rows("a", 20_000), size=100)
        state = await done(client, "s")
        assert time.monotonic() - began > fleet.lease_s
        assert (state.committed, state.failed) == (20_000, 0)
        assert "rescued" not in ahead.output + behind.output
        assert len(await client.embed(["a question"])) == 1

        # A dead one's jobs are taken over by one whose clock says that they have long expired,
        # or not begun.
        queue = keys.embed_queue(collection.spec.space, "bulk")
        sent, is_busy = 0, False
        while not is_busy:  # what came before may have been done before we looked
            name, sent = f"t{sent}", sent + 1
            await submit(client, collection, name, rows(name, 200), size=20)
            while not is_busy and (await client.submissions.get(name)).state != "done":
                is_busy = await client.redis.zcard(keys.lease(queue)) >= 4
        ahead.kill()
        state = await done(client, name)
        assert (state.committed, state.failed) == (200, 0)
        stats = await client.collection_stats(collection)
        assert stats["documents"] == 20_000 + 200 * sent
        assert await client.redis.zcard(keys.outstanding(collection.uid)) == 0
