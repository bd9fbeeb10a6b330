"""Whose fault it is that the engine failed."""

from __future__ import annotations

import asyncio
import threading
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from vecfleet.common.errors import (
    EngineBroken,
    EngineDied,
    EngineFailed,
    EngineStarting,
    TextsTooLong,
)
from vecfleet.fleet.cli import exit_code_of
from vecfleet.worker.engine import Priority
from vecfleet.worker.fake_engine import BREAK, POISON, ZERO, FakeEngine, FakeSettings
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


async def test_calls_that_a_broken_engine_holds_end_all_at_once():
    """Whose text it was is not known, and the one that did it may be far behind."""
    reached, gate = threading.Event(), threading.Event()

    def stand(*_) -> None:
        reached.set()
        gate.wait()

    engine = ProvenEngine(await FakeEngine.load(FakeSettings(on_step=stand, step_tokens=64)))
    blocks = [[f"block {b} text {n}" for n in range(64)] for b in range(8)]
    blocks[0] = [BREAK] * 64
    calls = [asyncio.create_task(engine.embed(blocks[0], priority=BULK))]
    await asyncio.to_thread(reached.wait)
    calls += [asyncio.create_task(engine.embed(texts, priority=BULK)) for texts in blocks[1:]]
    query = asyncio.create_task(engine.embed(["a query"], priority=INTERACTIVE))
    given_up = asyncio.create_task(engine.embed(["another"], priority=INTERACTIVE))
    while engine.stats.pending_tokens < 8 * 64:
        await asyncio.sleep(0.001)
    given_up.cancel()
    gate.set()
    for found in await asyncio.gather(*calls, query, return_exceptions=True):
        assert isinstance(found, EngineDied)
    with pytest.raises(asyncio.CancelledError):
        await given_up
    assert engine.stats.steps < 200  # nobody waits until each text has failed
    await engine.close()


@pytest.mark.parametrize("priority", [BULK, INTERACTIVE])
async def test_a_vector_that_is_not_of_length_1_is_its_texts_fault(engine, priority):
    with pytest.raises(EngineFailed, match="length 1") as raised:
        await engine.embed(["fine", ZERO, "fine"], priority=priority)
    assert (type(raised.value), raised.value.indices) == (EngineFailed, (1,))
    assert engine.stats.state == "ready"


async def test_an_engine_that_makes_nothing_else_is_broken(engine, monkeypatch):
    monkeypatch.setattr(
        "vecfleet.worker.fake_engine.fake_vector", lambda _, d: np.zeros(d, np.float32)
    )
    with pytest.raises(EngineDied, match="every text"):
        await engine.embed(["fine"], priority=BULK)
    assert engine.stats.state == "broken"


async def test_what_is_said_of_a_broken_engine_quotes_nobody(engine, caplog):
    with pytest.raises(EngineDied) as raised:
        await engine.embed([f"a secret {BREAK}"], priority=BULK)
    assert "secret" not in raised.value.message + caplog.text
    assert "every text" in caplog.text


async def test_a_broken_engine_takes_nothing_more(engine):
    with pytest.raises(EngineDied):
        await engine.rerank([("a", BREAK)], priority=INTERACTIVE)
    for _ in range(2):
        with pytest.raises(EngineBroken, match="every text"):
            await engine.embed(["fine"], priority=BULK)
        with pytest.raises(EngineBroken, match="every text"):
            await engine.rerank([("a", "b")], priority=BULK)


async def test_an_engine_is_proven_before_anybody_calls_it(engine):
    before = engine.stats.texts
    await engine.prove()
    assert engine.stats.texts == before + 1


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
async def test_an_engine_that_makes_nothing_right_is_not_proven(engine, monkeypatch, value):
    monkeypatch.setattr(
        "vecfleet.worker.fake_engine.fake_vector", lambda _, d: np.full(d, value, np.float32)
    )
    with pytest.raises(EngineFailed, match="fake loads, but fails on a text of our own"):
        await engine.prove()


async def test_an_engine_whose_step_thread_ends_is_not_proven(engine, monkeypatch):
    class Panic(BaseException):
        """As one of a library that is written in Rust."""

    def run(*_):
        raise Panic("at fault")

    monkeypatch.setattr("vecfleet.worker.fake_engine._FakeRunner.run", run)
    for _ in range(2):  # it has died; it is broken
        with pytest.raises(EngineFailed, match=r"loads, but fails .*ended: .*Panic") as raised:
            await engine.prove()
        assert exit_code_of(raised.value) == 1


@pytest.mark.parametrize("error", [EngineDied, EngineBroken, EngineStarting])
async def test_an_engine_that_dies_of_our_text_has_failed(engine, monkeypatch, error):
    """A service manager or a pool must count the start as one that failed."""

    async def die(*_, **__):
        raise error("it died")

    monkeypatch.setattr(engine._engine, "embed", die)
    with pytest.raises(EngineFailed, match=r"loads, but fails on a text .*it died") as e:
        await engine.prove()
    assert exit_code_of(e.value) == 1


@pytest.mark.parametrize("score", [0.5, np.nan])
async def test_an_engine_that_only_scores_is_proven_by_a_score(engine, monkeypatch, score):
    inner = engine._engine
    monkeypatch.setattr(inner, "card", replace(inner.card, tasks=("rerank",)))
    monkeypatch.setattr("vecfleet.worker.fake_engine.fake_score", lambda *_: score)
    with nullcontext() if np.isfinite(score) else pytest.raises(EngineFailed):
        await engine.prove()
    assert engine.stats.texts == 0


async def test_other_errors_pass(engine):
    with pytest.raises(TextsTooLong):
        await engine.embed(["one two three " * 9], priority=BULK, truncate=False)
    assert engine.stats.state == "ready"
    assert engine.device == "cpu"
    assert engine.card.name == "fake"
