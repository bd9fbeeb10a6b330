"""What the model reads with each text of a job is bounded: a small job must not be a long one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from vecfleet.common import keys, payloads
from vecfleet.common.errors import InvalidInput, TextTooLong, TooManyItems
from vecfleet.common.limits import MAX_REQUEST_TOKENS, MAX_TEXT_BYTES
from vecfleet.worker.embed_handler import EmbedHandler
from vecfleet.worker.fake_engine import FakeEngine, FakeSettings
from vecfleet.worker.job import Answer, ClaimedJob
from vecfleet.worker.ledger import Ledger
from vecfleet.worker.quarantine import Quarantine
from vecfleet.worker.rerank_handler import RerankHandler

QUARANTINE = Quarantine(cast(Ledger, None), {})  # no job here is a suspect
MOST = 4 * MAX_REQUEST_TOKENS  # bytes


@pytest.fixture
async def engine():
    engine = await FakeEngine.load(FakeSettings())
    engine.card = replace(engine.card, prompts={"query": "Instruct: search\nQuery: "})
    yield engine
    await engine.close()


def job(function: str, payload: dict[str, Any]) -> ClaimedJob:
    queue = keys.embed_queue("0" * 16, "interactive")
    return ClaimedJob("j", "e", queue, function, payload, 1, 0, 0, 1)


async def embed(engine: FakeEngine, texts: int, **more: Any) -> Any:
    payload = {"texts": ["a"] * texts, **more}
    return await EmbedHandler(engine, QUARANTINE)(job(payloads.EMBED, payload))


async def rerank(engine: FakeEngine, documents: int, **more: Any) -> Any:
    payload = {"query": "a", "documents": ["a"] * documents, **more}
    return await RerankHandler(engine, QUARANTINE)(job(payloads.RERANK, payload))


@pytest.mark.parametrize(
    ("texts", "more", "field"),
    [
        (1, {"prompt": "a" * (MAX_TEXT_BYTES + 1)}, "prompt"),
        (1, {"instruction": "a" * (MAX_TEXT_BYTES + 1)}, "instruction"),
        (600, {"prompt": "a" * (MOST // 600)}, "prompt"),
        (600, {"prompt": " " * (7 << 20)}, "prompt"),
        (600, {"instruction": "a" * (MOST // 600)}, "instruction"),
    ],
)
async def test_prompts_that_come_to_too_much_are_refused(engine, texts, more, field):
    with pytest.raises((TextTooLong, TooManyItems)) as caught:
        await embed(engine, texts, **more)
    assert caught.value.field == field


async def test_prompts_that_do_not_are_read(engine):
    assert isinstance(await embed(engine, 600, prompt="a" * 1000), Answer)
    assert isinstance(await embed(engine, 600, prompt=""), Answer)
    assert isinstance(await embed(engine, 1, prompt="\n"), Answer)


@pytest.mark.parametrize(
    ("documents", "more", "field"),
    [
        (1, {"instruction": "a" * (MAX_TEXT_BYTES + 1)}, "instruction"),
        (400, {"instruction": "a" * (MOST // 400)}, "instruction"),
        (400, {"query": "a" * (MOST // 400)}, "query"),
    ],
)
async def test_queries_that_come_to_too_much_are_refused(engine, documents, more, field):
    with pytest.raises((TextTooLong, TooManyItems)) as caught:
        await rerank(engine, documents, **more)
    assert caught.value.field == field


async def test_an_instruction_is_a_text(engine):
    with pytest.raises(InvalidInput, match="instruction must be a string"):
        await rerank(engine, 1, instruction=["a"])
    assert isinstance(await rerank(engine, 400, instruction="a", query="a" * 1000), Answer)
