"""Documents through real processes into the index, and what kill -9 does to that: nothing."""

from __future__ import annotations

import asyncio
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from servers import Process, eventually

from vecfleet.common.collection import Collection
from vecfleet.common.document import Document, cut_blocks, parse_document
from vecfleet.common.errors import InvalidInput, InvalidVector, UnknownCollection, VecfleetError
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.redis_client import connect_async
from vecfleet.producer import AsyncProducer
from vecfleet.worker.fake_engine import POISON, fake_vector

DIMENSION = 32
ROLES = Path(__file__).parent.parent / "roles.py"


class Pipeline:
    """Redis, worker, aggregator and search process, each of which a test may kill."""

    def __init__(self, url: str, data: Path, step_s: float) -> None:
        self.url, self.data, self.step_s = url, data, step_s
        self.processes: list[Process] = []

    def start(self, role: str) -> Process:
        arguments = [sys.executable, str(ROLES), role, self.url, str(self.data), str(self.step_s)]
        process = Process(arguments)
        self.processes.append(process)
        process.wait_for_line(f"{role} ready")
        return process

    def client(self) -> FleetClient:
        return FleetClient(connect_async(self.url), timeout_s=20)

    def close(self) -> None:
        for process in self.processes:
            process.close()


@pytest.fixture
def pipeline(redis_server_factory, tmp_path):
    made: list[Pipeline] = []

    def make(step_s: float = 0.0) -> Pipeline:
        pipeline = Pipeline(redis_server_factory().url, tmp_path / "data", step_s)
        made.append(pipeline)
        return pipeline

    yield make
    for pipeline in made:
        pipeline.close()


def documents(count: int, prefix: str = "doc") -> list[Document]:
    return [
        parse_document(
            {"id": f"{prefix}/{n}", "text": f"{prefix} number {n} speaks of topic {n % 7}"}
        )
        for n in range(count)
    ]


async def submit(
    client: FleetClient, collection: Collection, name: str, rows: list[Document], size: int = 256
) -> int:
    """Enqueue the rows as blocks of ``size``; returns how many blocks there are."""
    await client.submissions.open(name, tenant="-", collection=collection.name, uid=collection.uid)
    blocks = [
        block
        for start in range(0, len(rows), size)
        for block in cut_blocks(rows[start : start + size])
    ]
    for place, block in enumerate(blocks):
        await client.enqueue_block(collection, block, submission=name, place=place)
    await client.submissions.close(name, blocks=len(blocks), documents=len(rows))
    return len(blocks)


async def done(client: FleetClient, name: str) -> None:
    async def is_done() -> bool:
        return (await client.submissions.get(name)).state == "done"

    await eventually(is_done, 90, f"submission {name}")


async def every_document_once(
    client: FleetClient, collection: Collection, rows: list[Document]
) -> None:
    """Each document is there, with its text and its own vector, and there are no others."""
    stats = await client.collection_stats(collection)
    assert stats["documents"] == len({row.id for row in rows})
    for start in range(0, len(rows), 500):
        part = rows[start : start + 500]
        found = await client.documents(collection, [row.id for row in part])
        assert [(f.id, f.text) for f in found if f] == [(row.id, row.text) for row in part]
    for row in random.Random(1).sample(rows, min(len(rows), 20)):
        vector = fake_vector(row.text, DIMENSION).astype("<f4").tobytes()
        (hits,) = (await client.search(collection, vector, top_k=3)).hits
        assert hits[0].id == row.id
        assert hits[0].score > 0.999
        assert len({hit.id for hit in hits}) == 3


async def test_from_producer_to_search(pipeline):
    fleet = pipeline()
    for role in ("aggregator", "search", "worker"):
        fleet.start(role)
    async with fleet.client() as client:
        collection = await client.create_collection("books", model="fake")
        assert await client.create_collection("books", model="fake") == collection
        rows = documents(1000)
        await submit(client, collection, "s1", rows)
        await done(client, "s1")
        await every_document_once(client, collection, rows)

        changed = parse_document(
            {"id": "doc/3", "text": "quite another text", "metadata": {"a": [1]}}
        )
        await submit(client, collection, "s2", [changed])
        await done(client, "s2")
        (found,) = await client.documents(collection, ["doc/3"])
        assert (found.text, found.metadata) == ("quite another text", {"a": [1]})

        await client.submissions.open("s3", tenant="-", collection="books", uid=collection.uid)
        await client.enqueue_delete(collection, ["doc/4", "doc/none"], submission="s3")
        await client.submissions.close("s3", blocks=1, documents=2)
        await done(client, "s3")
        assert await client.documents(collection, ["doc/4"]) == [None]
        assert (await client.collection_stats(collection))["documents"] == 999

        for bad in (np.zeros(DIMENSION), np.full(DIMENSION, np.nan), np.ones(DIMENSION - 1)):
            with pytest.raises(InvalidVector):
                await client.search(collection, bad.astype("<f4").tobytes())

        await client.delete_collection("books")
        with pytest.raises(UnknownCollection):
            await client.collection("books")
        again = await client.create_collection("books", model="fake")
        assert again.uid != collection.uid
        assert (await client.collection_stats(again))["documents"] == 0
        with pytest.raises(UnknownCollection):
            await client.collection_stats(collection)


async def test_a_poisonous_text_is_refused_and_its_neighbours_are_kept(pipeline):
    fleet = pipeline()
    for role in ("aggregator", "search", "worker"):
        fleet.start(role)
    async with fleet.client() as client:
        collection = await client.create_collection("c", model="fake")
        rows = documents(100)
        rows[40] = parse_document({"id": "bad", "text": f"a {POISON} text"})
        await submit(client, collection, "s", rows)
        await done(client, "s")
        state = await client.submissions.get("s", with_errors=True)
        assert (state.committed, state.failed) == (99, 1)
        assert [(e["id"], e["code"]) for e in state.errors] == [("bad", "engine_failed")]
        await every_document_once(client, collection, [row for row in rows if row.id != "bad"])
        # The refused document waits in the dead letter, with its text, for people to look at.
        queue = "vf.-.embed." + collection.spec.space + ".bulk"
        assert await client.redis.zcard(f"rq:failed:{queue}") == 1


async def test_shards_of_a_deleted_collection_are_discarded(pipeline):
    fleet = pipeline()
    aggregator = fleet.start("aggregator")
    fleet.start("search")
    async with fleet.client() as client:
        worker = fleet.start("worker")
        collection = await client.create_collection("c", model="fake")
        worker.stop()
        await submit(client, collection, "s", documents(600))
        await client.delete_collection("c")
        again = await client.create_collection("c", model="fake")
        aggregator.stop()
        fleet.start("aggregator")  # a new one knows of the deletion too
        fleet.start("worker")
        await done(client, "s")
        assert (await client.collection_stats(again))["documents"] == 0
        assert await client.redis.keys("rq:job:*") == []


@pytest.mark.parametrize("victim", ["worker", "aggregator"])
async def test_kill_9_mid_batch_loses_and_doubles_nothing(pipeline, victim):
    fleet = pipeline(step_s=0.01)
    fleet.start("search")
    running = {role: fleet.start(role) for role in ("aggregator", "worker")}
    rows = documents(3000)
    async with fleet.client() as client:
        collection = await client.create_collection("c", model="fake")
        await submit(client, collection, "s", rows, size=50)
        for kill in range(1, 4):

            async def committed(least: int = 500 * kill) -> bool:
                return (await client.submissions.get("s")).committed >= least

            await eventually(committed, 60)
            running[victim].kill()
            running[victim] = fleet.start(victim)
        await done(client, "s")
        state = await client.submissions.get("s")
        assert (state.committed, state.failed) == (3000, 0)
        await every_document_once(client, collection, rows)
        assert await client.redis.keys("rq:job:*") == []


async def test_a_dead_aggregator_comes_back_to_a_full_redis_and_makes_room(pipeline):
    fleet = pipeline()
    running = {role: fleet.start(role) for role in ("aggregator", "search", "worker")}
    rows = documents(2000)
    async with fleet.client() as client:
        collection = await client.create_collection("c", model="fake")
        running["aggregator"].kill()
        await submit(client, collection, "s", rows)
        queue = f"rq:queue:{collection.merge_queue}"

        async def embedded() -> bool:
            return await client.redis.llen(queue) == 8

        await eventually(embedded)
        await client.redis.config_set("maxmemory-policy", "noeviction")
        await client.redis.config_set("maxmemory", 1_000_000)
        fleet.start("aggregator")
        await done(client, "s")
        await client.redis.config_set("maxmemory", 0)
        await every_document_once(client, collection, rows)


async def test_two_aggregators_take_turns(pipeline):
    fleet = pipeline()
    first = fleet.start("aggregator")
    arguments = [sys.executable, str(ROLES), "aggregator", fleet.url, str(fleet.data), "0"]
    second = Process(arguments)
    fleet.processes.append(second)
    second.wait_for_line("holds this index")
    assert first.stop() == 0
    second.wait_for_line("aggregator ready")
    fleet.start("worker")
    async with fleet.client() as client:
        await client.create_collection("c", model="fake")


async def test_a_search_that_nobody_answers_says_so(pipeline):
    fleet = pipeline()
    fleet.start("aggregator")
    fleet.start("worker")
    async with fleet.client() as client:
        collection = await client.create_collection("c", model="fake")
        vector = np.ones(DIMENSION, "<f4").tobytes()
        with pytest.raises(VecfleetError, match="no answer within 1 s"):
            await client.search(collection, vector, timeout_s=1)
        await asyncio.sleep(0)
        assert await client.redis.keys("rq:job:*") == []


async def test_a_producer_searches_by_vector(pipeline):
    fleet = pipeline()
    for role in ("aggregator", "search", "worker"):
        fleet.start(role)
    rows = [{"id": f"d{n}", "text": f"number {n}"} for n in range(20)]
    async with AsyncProducer(fleet.url) as producer:
        await producer.create_collection("books", model="fake")
        await producer.submit(rows, collection="books")
        vector = 3 * fake_vector("number 7", DIMENSION)
        for given in (vector, vector.tolist(), tuple(vector.tolist()), vector.tobytes()):
            hits = await producer.search("books", vector=given, top_k=2)
            assert (hits[0].id, round(hits[0].score, 2)) == ("d7", 1.0)
        both = await producer.search("books", "number 3", vector=vector, rerank=True, top_k=3)
        assert "d7" in [hit.id for hit in both]
        assert all(hit.relevance is not None for hit in both)
        for wrong in ([0.0] * DIMENSION, [math.nan] * DIMENSION, [1.0], b"123", "1.0", 5, [None]):
            with pytest.raises(InvalidVector) as raised:
                await producer.search("books", vector=wrong)
            assert raised.value.field == "vector"
        for arguments in ({}, {"query": "a", "vector": vector}, {"vector": vector, "rerank": True}):
            with pytest.raises(InvalidInput):
                await producer.search("books", **arguments)
