"""Whose text it was that a reranking by cosine failed on."""

from __future__ import annotations

import pytest

from vecfleet.common.errors import EngineFailed
from vecfleet.worker.cosine_rerank import rerank_by_cosine
from vecfleet.worker.engine import Priority
from vecfleet.worker.fake_engine import POISON, FakeEngine

HOW = {"document_prompt": "", "priority": Priority.BULK, "instruction": "", "truncate": True}


@pytest.fixture
async def engine():
    engine = await FakeEngine.load()
    yield engine
    await engine.close()


async def test_a_query_that_cannot_be_computed_is_not_told_as_a_document(engine):
    with pytest.raises(EngineFailed, match=r"query: .*poison") as raised:
        await rerank_by_cosine(engine, [(POISON, "a"), (POISON, "b")], **HOW)
    assert (raised.value.field, raised.value.indices) == ("query", (0, 1))


async def test_a_document_that_cannot_be_computed_is_told_by_its_place(engine):
    with pytest.raises(EngineFailed) as raised:
        await rerank_by_cosine(engine, [("q", "a"), ("q", POISON)], **HOW)
    assert (raised.value.field, raised.value.indices) == (None, (1,))
    assert raised.value.named("documents").field == "documents[1]"
