"""Tenants that no process was told of: one fleet embeds, indexes and searches for all of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Process, eventually

from vecfleet.common import keys
from vecfleet.common.document import Block, Document
from vecfleet.common.errors import UnknownCollection
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.redis_client import connect_async
from vecfleet.worker.fake_engine import fake_vector

ROLES = Path(__file__).parents[1] / "roles.py"
DIMENSION = 32
TENANTS = ("-", "acme", "b-2_c")


@pytest.fixture
def fleet(redis_url, tmp_path) -> Iterator[str]:
    started: list[Process] = []
    try:
        for role in ("aggregator", "search", "worker"):
            process = Process([sys.executable, str(ROLES), role, redis_url, str(tmp_path), "0"])
            started.append(process)
            process.wait_for_line(f"{role} ready")
        yield redis_url
    finally:
        for process in started:
            process.close()


async def test_every_tenant_is_served_from_its_first_request_on(fleet):
    async with FleetClient(connect_async(fleet), timeout_s=20) as client:
        for tenant in TENANTS:
            reply = await client.embed(["a question"], model="fake", tenant=tenant)
            assert reply.vectors == fake_vector("a question", DIMENSION).tobytes()
            scores = await client.rerank("a b", ["a", "c"], model="fake", tenant=tenant)
            assert len(scores.scores) == 2

            collection = await client.create_collection("books", model="fake", tenant=tenant)
            text = f"a book of {tenant}"
            block = Block()
            block.add(Document("one", text))
            submission = f"s{TENANTS.index(tenant)}"
            await client.submissions.open(
                submission, tenant=tenant, collection="books", uid=collection.uid
            )
            await client.enqueue_block(collection, block, submission=submission, place=0)
            await client.submissions.close(submission, blocks=1, documents=1)

            async def is_done(submission: str = submission) -> bool:
                return (await client.submissions.get(submission)).state == "done"

            await eventually(is_done)
            vector = fake_vector(text, DIMENSION).tobytes()
            (hits,) = (await client.search(collection, vector, top_k=5)).hits
            assert [(hit.id, hit.text) for hit in hits] == [("one", text)]

        await client.delete_collection("books", tenant="acme")
        with pytest.raises(UnknownCollection):
            await client.collection("books", tenant="acme")
        assert (await client.collection("books")).tenant == keys.DEFAULT_TENANT
        assert await client.redis.keys("rq:job:*") == []
        left = [name async for name in client.redis.scan_iter("vf:line:*")]
        assert left == []
