"""Which texts are too long is known at the far end of the queue, and told at this one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis.asyncio
from gateway_responder import Responder

from vecfleet.common.errors import TextsTooLong
from vecfleet.producer.producer import AsyncProducer
from vecfleet.worker.cosine_rerank import rerank_by_cosine
from vecfleet.worker.engine import Priority
from vecfleet.worker.fake_engine import FakeEngine, FakeSettings

LONG = "word " * 100


@pytest.fixture
async def producer(
    redis_url: str, redis_async: redis.asyncio.Redis
) -> AsyncIterator[AsyncProducer]:
    def refuse(function: str, payload: dict[str, Any]) -> dict[str, Any]:
        texts = payload.get("texts", payload.get("documents"))
        long = [place for place, text in enumerate(texts) if text == LONG]
        return (
            {"error": TextsTooLong(indices=long).to_wire()} if long else answer(function, payload)
        )

    async with Responder(redis_async) as responder, AsyncProducer(redis_url) as producer:
        answer, responder.answer = responder.answer, refuse
        yield producer


async def test_a_text_is_named_by_its_place_in_the_whole_call(producer: AsyncProducer) -> None:
    texts = ["short"] * 600
    texts[300] = texts[400] = LONG  # both in the second block
    with pytest.raises(TextsTooLong) as raised:
        await producer.embed(texts, truncate=False)
    assert raised.value.field == "texts[300]"
    assert raised.value.message.startswith("texts[300] and 1 more are longer")
    assert raised.value.indices == (300, 400)


async def test_a_document_is_named(producer: AsyncProducer) -> None:
    with pytest.raises(TextsTooLong) as raised:
        await producer.rerank("query", ["short", LONG])
    assert raised.value.field == "documents[1]"
    assert raised.value.message.startswith("documents[1] is longer")


@pytest.mark.parametrize(
    ("query", "document", "field"), [(LONG, "short", "query"), ("short", LONG, None)]
)
async def test_reranking_by_cosine_tells_query_and_document_apart(
    query: str, document: str, field: str | None
) -> None:
    engine = await FakeEngine.load(FakeSettings())
    try:
        with pytest.raises(TextsTooLong) as raised:
            await rerank_by_cosine(
                engine,
                [(query, "a"), (query, document)],
                document_prompt="",
                priority=Priority.INTERACTIVE,
                instruction="",
                truncate=False,
            )
    finally:
        await engine.close()
    assert raised.value.field == field
    assert raised.value.indices == ((0, 1) if field else (1,))
