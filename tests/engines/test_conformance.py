"""What every engine promises, asked of each of them.

Order between steps is seen through ``on_step``, which the engine calls on its step thread: a gate
there holds a step back until the test has queued what it wants to see ordered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest
from engines import rigs
from engines.checkpoints import NAN, POISON
from engines.rigs import DEADLINE_S, HAS_VLLM, STEP_TOKENS, Gate, OwnLoop, ProcessGate

from vecfleet.common.errors import EngineFailed, TextsTooLong, Unavailable
from vecfleet.worker import fake_engine
from vecfleet.worker.engine import Engine, Priority
from vecfleet.worker.fake_engine import NO_MEMORY, FakeEngine, FakeSettings, fake_vector

INTERACTIVE, BULK = Priority.INTERACTIVE, Priority.BULK
STEPPING = ["fake", "torch", *(["vllm"] if HAS_VLLM else [])]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="session")
def shared_vllm(qwen3_embedding) -> Iterator[tuple[OwnLoop, ProcessGate]]:
    gate = ProcessGate()
    engine = OwnLoop(lambda: rigs.load_vllm(qwen3_embedding, gate))
    yield engine, gate
    engine.end()


@pytest.fixture(scope="session")
def fragile_vllm(fragile_embedding) -> Iterator[OwnLoop]:
    engine = OwnLoop(lambda: rigs.load_vllm(fragile_embedding))
    yield engine
    engine.end()


@pytest.fixture
def kind(request) -> str:
    return request.param


@pytest.fixture
def gate(kind, request) -> Gate:
    return request.getfixturevalue("shared_vllm")[1] if kind == "vllm" else Gate()


@pytest.fixture
async def engine(kind, gate, request) -> AsyncIterator[Engine]:
    if kind == "vllm":
        yield request.getfixturevalue("shared_vllm")[0]
        gate.open()
        return
    engine = await _load_own(kind, gate, request)
    yield engine
    gate.open()
    await engine.close()


@pytest.fixture
async def own_engine(kind, request) -> AsyncIterator[tuple[Engine, Gate]]:
    """An engine that the test may close."""
    gate = ProcessGate() if kind == "vllm" else Gate()
    engine = await _load_own(kind, gate, request)
    yield engine, gate
    gate.open()
    await engine.close()


async def _load_own(kind: str, gate: Gate, request: pytest.FixtureRequest) -> Engine:
    match kind:
        case "fake":
            return await rigs.load_fake(gate)
        case "null":
            return await rigs.load_null(gate)
    folder = request.getfixturevalue("qwen3_embedding")
    return await (rigs.load_vllm if kind == "vllm" else rigs.load_torch)(folder, gate)


every = pytest.mark.parametrize("kind", ["null", *STEPPING], indirect=True)
stepwise = pytest.mark.parametrize("kind", STEPPING, indirect=True)


def sentences(count: int, start: int = 0) -> list[str]:
    return [
        f"gravity number {n} " + "attracts bodies " * (n % 9) for n in range(start, start + count)
    ]


async def waiting(engine: Engine, tokens: int) -> None:
    """Wait until at least ``tokens`` tokens wait or run."""
    async with asyncio.timeout(DEADLINE_S):
        while engine.stats.pending_tokens < tokens:
            await asyncio.sleep(0.001)


async def tokens_of(engine: Engine, texts: list[str]) -> int:
    """How many tokens wait when all of these do."""
    return int((await engine.embed(texts, priority=BULK)).tokens.sum())


# -- every engine -------------------------------------------------------------------------------


@every
async def test_card_describes_the_vectors(engine):
    found = await engine.embed(sentences(3), priority=BULK)
    assert found.vectors.shape == (3, engine.card.dimension)
    assert found.vectors.dtype == np.float32
    assert "embed" in engine.card.tasks
    assert len(engine.card.space) == 16
    assert type(engine.card).from_wire(engine.card.to_wire()) == engine.card


@every
async def test_vectors_are_normalised(engine):
    found = await engine.embed(sentences(40), priority=BULK)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)


@every
async def test_order_is_kept_whatever_shares_the_steps(engine):
    texts = sentences(300)
    alone = [await engine.embed([text], priority=INTERACTIVE) for text in texts[::30]]
    together = await engine.embed(texts, priority=BULK)
    for one, vector in zip(alone, together.vectors[::30], strict=True):
        np.testing.assert_allclose(one.vectors[0], vector, atol=1e-5)


@every
async def test_many_calls_at_once_each_get_their_own(engine):
    calls = [sentences(1 + n % 7, start=n) for n in range(120)]
    found = await asyncio.gather(
        *(engine.embed(c, priority=Priority(n % 2)) for n, c in enumerate(calls))
    )
    for texts, result in list(zip(calls, found, strict=True))[::17]:
        again = await engine.embed(texts, priority=BULK)
        np.testing.assert_allclose(result.vectors, again.vectors, atol=1e-5)
        assert result.tokens.tolist() == again.tokens.tolist()


@every
async def test_no_texts_no_vectors(engine):
    found = await engine.embed([], priority=BULK)
    assert found.vectors.shape == (0, engine.card.dimension)
    assert found.tokens.shape == found.truncated.shape == (0,)


@every
async def test_closing_twice_is_harmless_and_calls_are_refused_after(own_engine):
    engine, _ = own_engine
    await engine.close()
    await engine.close()
    with pytest.raises(Unavailable):
        await engine.embed(["late"], priority=BULK)


@every
async def test_stats_count_texts_and_tokens(engine):
    before = engine.stats
    found = await engine.embed(sentences(50), priority=BULK)
    stats = engine.stats
    assert stats.texts - before.texts == 50
    assert stats.tokens - before.tokens == found.tokens.sum()
    assert stats.steps > before.steps
    assert stats.pending_tokens == 0


# -- engines that cut texts and run step by step ------------------------------------------------


@stepwise
async def test_long_texts_are_cut_and_told(engine):
    texts = ["short", "gravity " * 500, "gravity " * 20_000]
    found = await engine.embed(texts, priority=BULK)
    assert found.truncated.tolist() == [False, True, True]
    assert found.tokens.tolist()[1:] == [engine.card.max_tokens] * 2


@stepwise
@pytest.mark.parametrize("extra", [0, 300])
async def test_long_texts_are_refused_by_their_places(engine, extra):
    texts = ["short", "gravity " * 500, "fine", "gravity " * 400, *sentences(extra)]
    before = engine.stats.texts
    with pytest.raises(TextsTooLong) as raised:
        await engine.embed(texts, priority=BULK, truncate=False)
    assert raised.value.indices == (1, 3)
    assert engine.stats.texts == before


@stepwise
async def test_a_prompt_comes_before_the_text(engine):
    prompted = await engine.embed(["is a force"], priority=BULK, prompt="gravity ")
    written = await engine.embed(["gravity is a force"], priority=BULK)
    np.testing.assert_allclose(prompted.vectors, written.vectors, atol=1e-6)


@stepwise
async def test_interactive_passes_bulk_that_waits(engine, gate):
    queued = await tokens_of(engine, sentences(200)) + await tokens_of(engine, sentences(20))
    gate.shut()
    bulk = asyncio.create_task(engine.embed(sentences(200), priority=BULK))
    await gate.wait_for_step()
    query = asyncio.create_task(engine.embed(["a query"], priority=INTERACTIVE))
    large = asyncio.create_task(engine.embed(sentences(20), priority=INTERACTIVE))
    await waiting(engine, queued)
    gate.open()
    await asyncio.gather(bulk, query, large)
    order = [priority for priority, _ in gate.steps]
    # At most the step that stood at the gate goes before them.
    assert order.index(INTERACTIVE) <= 1
    assert order[2:].count(BULK) > 1


@stepwise
async def test_bulk_keeps_a_share_while_interactive_never_ends(engine, gate):
    done = asyncio.Event()

    async def ask(number: int) -> None:
        while not done.is_set():
            await engine.embed(sentences(12, start=number), priority=INTERACTIVE)

    askers = [asyncio.create_task(ask(number)) for number in range(30)]
    await waiting(engine, STEP_TOKENS)
    async with asyncio.timeout(DEADLINE_S):
        await engine.embed(sentences(60), priority=BULK)
    done.set()
    await asyncio.gather(*askers)


@stepwise
async def test_cancelling_drops_what_waits(engine, gate):
    before = engine.stats.texts
    gate.shut()
    first = asyncio.create_task(engine.embed(sentences(20), priority=BULK))
    await gate.wait_for_step()
    gone = asyncio.create_task(engine.embed(sentences(1000), priority=BULK))
    await waiting(engine, 10 * STEP_TOKENS)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    kept = asyncio.create_task(engine.embed(sentences(5), priority=BULK))
    gate.open()
    await asyncio.gather(first, kept)
    assert engine.stats.texts - before == 25
    assert engine.stats.pending_tokens == 0


@stepwise
async def test_closing_fails_what_waits(own_engine):
    engine, gate = own_engine
    gate.shut()
    calls = [asyncio.create_task(engine.embed(sentences(300), priority=BULK)) for _ in range(3)]
    await gate.wait_for_step()
    closing = asyncio.create_task(engine.close())
    await asyncio.sleep(0)
    gate.open()
    await closing
    for result in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(result, Unavailable)


@stepwise
async def test_the_loop_is_not_held_up_by_a_step(engine, gate):
    gate.shut()
    call = asyncio.create_task(engine.embed(sentences(20), priority=BULK))
    await gate.wait_for_step()
    await asyncio.sleep(0)  # would not come back
    assert not call.done()
    gate.open()
    await call


@stepwise
async def test_rerank_scores_lie_between_0_and_1_in_order(engine):
    pairs = [("what is gravity", text) for text in sentences(40)]
    together = await engine.rerank(pairs, priority=BULK)
    assert together.scores.dtype == np.float32
    assert together.scores.min() >= 0 and together.scores.max() <= 1
    alone = await engine.rerank(pairs[7:8], priority=INTERACTIVE)
    np.testing.assert_allclose(alone.scores, together.scores[7:8], atol=1e-5)
    assert (await engine.rerank([], priority=BULK)).scores.shape == (0,)


# -- failures ---------------------------------------------------------------------------------


@pytest.fixture
async def fragile(kind, request) -> AsyncIterator[Engine]:
    """An engine whose model fails on ``POISON`` and gives NaN for ``NAN``."""
    if kind == "vllm":
        yield request.getfixturevalue("fragile_vllm")
        return
    if kind == "torch":
        engine = await rigs.load_torch(request.getfixturevalue("fragile_embedding"))
    else:
        engine = await rigs.load_fake(Gate())
    yield engine
    await engine.close()


@stepwise
@pytest.mark.parametrize("mark", ["poison", "nan"])
async def test_a_text_that_fails_fails_its_own_call_only(kind, mark, fragile):
    marks = fake_engine if kind == "fake" else None
    poison = marks.POISON if marks else POISON
    nan = marks.NAN if marks else NAN
    healthy = await fragile.embed(sentences(60), priority=BULK)
    bad = sentences(10)
    bad[3] = bad[8] = poison if mark == "poison" else nan
    results = await asyncio.gather(
        fragile.embed(sentences(60), priority=BULK),
        fragile.embed(bad, priority=BULK),
        fragile.embed(sentences(30, start=9), priority=BULK),
        return_exceptions=True,
    )
    np.testing.assert_allclose(results[0].vectors, healthy.vectors, atol=1e-5)
    assert isinstance(results[1], EngineFailed)
    assert results[1].indices == (3, 8)
    assert len(results[2].vectors) == 30
    assert np.isfinite(results[2].vectors).all()


async def test_a_step_out_of_memory_is_run_in_parts():
    engine = await rigs.load_fake(Gate())
    found = await engine.embed([*sentences(30), NO_MEMORY], priority=BULK)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)
    await engine.close()


# -- what only one of them promises -------------------------------------------------------------


async def test_fake_vectors_can_be_recomputed():
    engine = await FakeEngine.load(FakeSettings(dimension=48, document_prompt="passage: "))
    found = await engine.embed(["a", "b"], priority=BULK)
    bare = await engine.embed(["a"], priority=BULK, prompt="")
    await engine.close()
    np.testing.assert_array_equal(found.vectors[1], fake_vector("passage: b", 48))
    np.testing.assert_array_equal(bare.vectors[0], fake_vector("a", 48))
