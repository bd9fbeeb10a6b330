"""Long texts: what one answer may carry, and that many large answers at once all come."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from servers import Process

from vecfleet.common.errors import ReplyTooLarge
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.limits import MAX_REPLY_BYTES, MAX_TEXT_BYTES
from vecfleet.common.redis_client import connect_async
from vecfleet.producer import AsyncProducer
from vecfleet.worker.fake_engine import fake_vector

ROLES = Path(__file__).parent.parent / "roles.py"
DOCUMENTS = MAX_REPLY_BYTES // MAX_TEXT_BYTES + 16
FIT = MAX_REPLY_BYTES // MAX_TEXT_BYTES - 8
TEXTS = {f"d{n}": f"{n} " + "a long text " * (MAX_TEXT_BYTES // 12 - 1) for n in range(DOCUMENTS)}


@pytest.fixture
async def url(redis_server_factory: Callable[..., object], tmp_path: Path) -> AsyncIterator[str]:
    url = str(redis_server_factory().url)  # type: ignore[attr-defined]
    roles = [
        Process([sys.executable, str(ROLES), role, url, str(tmp_path / "data"), "0"])
        for role in ("aggregator", "search", "worker")
    ]
    for name, role in zip(("aggregator", "search", "worker"), roles, strict=True):
        await asyncio.to_thread(role.wait_for_line, f"{name} ready")
    yield url
    for role in roles:
        role.close()


async def test_answers_are_bounded_and_all_that_fit_come(url: str) -> None:
    async with AsyncProducer(url) as producer, FleetClient(connect_async(url)) as client:
        await producer.create_collection("c")
        rows = [{"id": name, "text": text} for name, text in TEXTS.items()]
        result = await producer.submit(rows, collection="c")
        assert result.committed == DOCUMENTS
        collection = await client.collection("c")
        vector = fake_vector("anything", collection.spec.dimension).tobytes()

        with pytest.raises(ReplyTooLarge, match="top_k") as caught:
            await client.search(collection, vector, top_k=DOCUMENTS)
        assert caught.value.field == "top_k"
        with pytest.raises(ReplyTooLarge):
            await client.documents(collection, list(TEXTS))

        answers = await asyncio.gather(
            *(client.search(collection, vector, top_k=FIT) for _ in range(8))
        )
        for answer in answers:
            assert {hit.id: hit.text for hit in answer.hits[0]}.items() <= TEXTS.items()
            assert len(answer.hits[0]) == FIT

        found = await producer.get("c", list(TEXTS))  # in as many calls as it takes
        assert {entry.id: entry.text for entry in found if entry} == TEXTS
