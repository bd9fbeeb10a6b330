"""Whose fault it is that the engine failed."""

from __future__ import annotations

import asyncio

import pytest

from vecfleet.common.errors import EngineBroken, EngineDied, EngineFailed, TextsTooLong
from vecfleet.worker.engine import Priority
from vecfleet.worker.fake_engine import BREAK, POISON, FakeEngine, FakeSettings
from vecfleet.worker.proven_engine import ProvenEngine

BULK, INTERACTIVE = Priority.BULK, Priority.INTERACTIVE


@pytest.fixture
async def engine():
    engine = ProvenEngine(await FakeEngine.load(FakeSettings(max_tokens=8)))
    yield engine
    await engine.close()


@pytest.mark.parametrize("priority", [BULK, INTERACTIVE])
async def test_texts_are_at_fault_where_the_engine_computes_another(engine, priority):
    with pytest.raises(EngineFailed) as raised:
        await engine.embed(["fine", POISON, "fine", POISON], priority=priority)
    assert type(raised.value) is EngineFailed
    assert raised.value.indices == (1, 3)
    with pytest.raises(EngineFailed) as raised:
        await engine.rerank([("a", "b"), ("a", POISON)], priority=priority)
    assert (type(raised.value), raised.value.indices) == (EngineFailed, (1,))
    assert engine.stats.state == "ready"
    assert len((await engine.embed(["fine"], priority=priority)).vectors) == 1


async def test_an_engine_that_fails_on_every_text_has_died_of_those_it_held(engine):
    before = await engine.embed(["fine"], priority=BULK)
    assert len(before.vectors) == 1
    calls = [engine.embed([f"text {n}", BREAK], priority=BULK) for n in range(3)]
    for found in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(found, EngineDied)
        assert "every text" in found.message
    assert engine.stats.state == "broken"


async def test_a_broken_engine_takes_nothing_more(engine):
    with pytest.raises(EngineDied):
        await engine.rerank([("a", BREAK)], priority=INTERACTIVE)
    for _ in range(2):
        with pytest.raises(EngineBroken, match="every text"):
            await engine.embed(["fine"], priority=BULK)
        with pytest.raises(EngineBroken, match="every text"):
            await engine.rerank([("a", "b")], priority=BULK)


async def test_other_errors_pass(engine):
    with pytest.raises(TextsTooLong):
        await engine.embed(["one two three " * 9], priority=BULK, truncate=False)
    assert engine.stats.state == "ready"
    assert engine.device == "cpu"
    assert engine.card.name == "fake"
