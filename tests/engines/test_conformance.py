"""What every engine promises, asked of each of them.

Order between steps is seen through ``on_step``, which the engine calls on its step thread: a gate
there holds a step back until the test has queued what it wants to see ordered.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from vecfleet.common.errors import EngineFailed, TextsTooLong, Unavailable
from vecfleet.worker.engine import Engine, Priority
from vecfleet.worker.fake_engine import (
    NAN,
    NO_MEMORY,
    POISON,
    FakeEngine,
    FakeSettings,
    NullEngine,
    fake_vector,
)
from vecfleet.worker.torch_engine import TorchEngine
from vecfleet.worker.torch_loading import TorchSettings

INTERACTIVE, BULK = Priority.INTERACTIVE, Priority.BULK
STEP_TOKENS = 256
DEADLINE_S = 60


@dataclass
class Gate:
    """Records steps, and holds them back while it is shut."""

    steps: list[tuple[Priority, int]] = field(default_factory=list)
    opened: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        self.opened.set()

    def __call__(self, priority, texts):
        self.steps.append((priority, texts))
        self.reached.set()
        assert self.opened.wait(DEADLINE_S)

    def shut(self):
        self.steps.clear()
        self.reached.clear()
        self.opened.clear()

    async def wait_for_step(self):
        assert await asyncio.to_thread(self.reached.wait, DEADLINE_S)


async def load(kind: str, gate: Gate, request: pytest.FixtureRequest) -> Engine:
    if kind == "fake":
        settings = FakeSettings(step_tokens=STEP_TOKENS, max_tokens=128, on_step=gate)
        return await FakeEngine.load(settings)
    if kind == "null":
        return NullEngine()
    folder = request.getfixturevalue("qwen3_embedding")
    return await TorchEngine.load(
        str(folder),
        TorchSettings(
            device="cpu", dtype="float32", step_tokens=STEP_TOKENS, max_tokens=128, on_step=gate
        ),
    )


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture(params=["fake", "null", "torch"])
async def engine(request, gate) -> AsyncIterator[Engine]:
    engine = await load(request.param, gate, request)
    yield engine
    gate.opened.set()
    await engine.close()


@pytest.fixture(params=["fake", "torch"])
async def stepping(request, gate) -> AsyncIterator[Engine]:
    """Engines that run step by step."""
    engine = await load(request.param, gate, request)
    yield engine
    gate.opened.set()
    await engine.close()


def sentences(count: int, start: int = 0) -> list[str]:
    return [
        f"gravity number {n} " + "attracts bodies " * (n % 9) for n in range(start, start + count)
    ]


async def waiting(engine: Engine, tokens: int) -> None:
    """Wait until at least ``tokens`` tokens wait or run."""
    async with asyncio.timeout(DEADLINE_S):
        while engine.stats.pending_tokens < tokens:
            await asyncio.sleep(0.001)


# -- every engine -------------------------------------------------------------------------------


async def test_card_describes_the_vectors(engine):
    found = await engine.embed(sentences(3), priority=BULK)
    assert found.vectors.shape == (3, engine.card.dimension)
    assert found.vectors.dtype == np.float32
    assert "embed" in engine.card.tasks
    assert len(engine.card.space) == 16
    assert type(engine.card).from_wire(engine.card.to_wire()) == engine.card


async def test_vectors_are_normalised(engine):
    found = await engine.embed(sentences(40), priority=BULK)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1, atol=1e-5)


async def test_order_is_kept_whatever_shares_the_steps(engine):
    texts = sentences(300)
    alone = [await engine.embed([text], priority=INTERACTIVE) for text in texts[::30]]
    together = await engine.embed(texts, priority=BULK)
    for one, vector in zip(alone, together.vectors[::30], strict=True):
        np.testing.assert_allclose(one.vectors[0], vector, atol=1e-5)


async def test_many_calls_at_once_each_get_their_own(engine):
    calls = [sentences(1 + n % 7, start=n) for n in range(120)]
    found = await asyncio.gather(
        *(engine.embed(c, priority=Priority(n % 2)) for n, c in enumerate(calls))
    )
    for texts, result in list(zip(calls, found, strict=True))[::17]:
        again = await engine.embed(texts, priority=BULK)
        np.testing.assert_allclose(result.vectors, again.vectors, atol=1e-5)
        assert result.tokens.tolist() == again.tokens.tolist()


async def test_no_texts_no_vectors(engine):
    found = await engine.embed([], priority=BULK)
    assert found.vectors.shape == (0, engine.card.dimension)
    assert found.tokens.shape == found.truncated.shape == (0,)


async def test_closing_twice_is_harmless_and_calls_are_refused_after(engine):
    await engine.close()
    await engine.close()
    with pytest.raises(Unavailable):
        await engine.embed(["late"], priority=BULK)


async def test_stats_count_texts_and_tokens(engine):
    found = await engine.embed(sentences(50), priority=BULK)
    stats = engine.stats
    assert (stats.texts, stats.tokens) == (50, found.tokens.sum())
    assert stats.steps >= 1
    assert stats.pending_tokens == 0


# -- engines that cut texts and run step by step ------------------------------------------------


async def test_long_texts_are_cut_and_told(stepping):
    texts = ["short", "gravity " * 500, "gravity " * 20_000]
    found = await stepping.embed(texts, priority=BULK)
    assert found.truncated.tolist() == [False, True, True]
    assert found.tokens.tolist()[1:] == [stepping.card.max_tokens] * 2


@pytest.mark.parametrize("extra", [0, 300])
async def test_long_texts_are_refused_by_their_places(stepping, extra):
    texts = ["short", "gravity " * 500, "fine", "gravity " * 400, *sentences(extra)]
    with pytest.raises(TextsTooLong) as raised:
        await stepping.embed(texts, priority=BULK, truncate=False)
    assert raised.value.indices == (1, 3)
    assert stepping.stats.texts == 0


async def test_a_prompt_comes_before_the_text(stepping):
    prompted = await stepping.embed(["is a force"], priority=BULK, prompt="gravity ")
    written = await stepping.embed(["gravity is a force"], priority=BULK)
    np.testing.assert_allclose(prompted.vectors, written.vectors, atol=1e-6)


async def test_interactive_passes_bulk_that_waits(stepping, gate):
    gate.shut()
    bulk = asyncio.create_task(stepping.embed(sentences(200), priority=BULK))
    await gate.wait_for_step()
    query = asyncio.create_task(stepping.embed(["a query"], priority=INTERACTIVE))
    large = asyncio.create_task(stepping.embed(sentences(20), priority=INTERACTIVE))
    await waiting(stepping, 2 * STEP_TOKENS)
    gate.opened.set()
    await asyncio.gather(bulk, query, large)
    order = [priority for priority, _ in gate.steps]
    assert order[:2] == [BULK, INTERACTIVE]
    assert order[2:].count(BULK) > 1


async def test_bulk_keeps_a_share_while_interactive_never_ends(stepping, gate):
    done = asyncio.Event()

    async def ask(number: int) -> None:
        while not done.is_set():
            await stepping.embed(sentences(12, start=number), priority=INTERACTIVE)

    askers = [asyncio.create_task(ask(number)) for number in range(30)]
    await waiting(stepping, STEP_TOKENS)
    async with asyncio.timeout(DEADLINE_S):
        await stepping.embed(sentences(60), priority=BULK)
    done.set()
    await asyncio.gather(*askers)


async def test_cancelling_drops_what_waits(stepping, gate):
    gate.shut()
    first = asyncio.create_task(stepping.embed(sentences(20), priority=BULK))
    await gate.wait_for_step()
    gone = asyncio.create_task(stepping.embed(sentences(1000), priority=BULK))
    await waiting(stepping, 10 * STEP_TOKENS)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    kept = asyncio.create_task(stepping.embed(sentences(5), priority=BULK))
    gate.opened.set()
    await asyncio.gather(first, kept)
    assert stepping.stats.texts == 25
    assert stepping.stats.pending_tokens == 0


async def test_closing_fails_what_waits(stepping, gate):
    gate.shut()
    calls = [asyncio.create_task(stepping.embed(sentences(300), priority=BULK)) for _ in range(3)]
    await gate.wait_for_step()
    closing = asyncio.create_task(stepping.close())
    await asyncio.sleep(0)
    gate.opened.set()
    await closing
    for result in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(result, Unavailable)


async def test_the_loop_is_not_held_up_by_a_step(stepping, gate):
    gate.shut()
    call = asyncio.create_task(stepping.embed(sentences(20), priority=BULK))
    await gate.wait_for_step()
    await asyncio.sleep(0)  # would not come back
    assert not call.done()
    gate.opened.set()
    await call


async def test_rerank_scores_lie_between_0_and_1_in_order(stepping):
    pairs = [("what is gravity", text) for text in sentences(40)]
    together = await stepping.rerank(pairs, priority=BULK)
    assert together.scores.dtype == np.float32
    assert together.scores.min() >= 0 and together.scores.max() <= 1
    alone = await stepping.rerank(pairs[7:8], priority=INTERACTIVE)
    np.testing.assert_allclose(alone.scores, together.scores[7:8], atol=1e-5)
    assert (await stepping.rerank([], priority=BULK)).scores.shape == (0,)


# -- failures -----------------------------------------------------------------------------------


@pytest.fixture
async def fragile(request, gate) -> AsyncIterator[TorchEngine]:
    """The torch engine with a model that fails as the fake one does."""
    engine = await load("torch", gate, request)
    model = engine._steps._runner
    healthy = model.run
    marks = {
        mark: engine._tokenizer.texts([mark], truncate=True)[0].payload.ids[:-1].tobytes()
        for mark in (POISON, NAN, NO_MEMORY)
    }

    def run(payloads):
        has = {m: [ids in p.ids.tobytes() for p in payloads] for m, ids in marks.items()}
        if any(has[POISON]):
            raise RuntimeError("poison")
        if any(has[NO_MEMORY]) and len(payloads) > 1:
            raise MemoryError("out of memory")
        rows = healthy(payloads)
        rows[has[NAN]] = np.nan
        return rows

    model.run = run
    yield engine
    await engine.close()


@pytest.mark.parametrize("kind", ["fake", "torch"])
@pytest.mark.parametrize("mark", [POISON, NAN])
async def test_a_text_that_fails_fails_its_own_call_only(kind, mark, gate, request, fragile):
    engine = fragile if kind == "torch" else await load(kind, gate, request)
    healthy = await engine.embed(sentences(60), priority=BULK)
    bad = sentences(10)
    bad[3] = bad[8] = mark
    results = await asyncio.gather(
        engine.embed(sentences(60), priority=BULK),
        engine.embed(bad, priority=BULK),
        engine.embed(sentences(30, start=9), priority=BULK),
        return_exceptions=True,
    )
    np.testing.assert_allclose(results[0].vectors, healthy.vectors, atol=1e-5)
    assert isinstance(results[1], EngineFailed)
    assert results[1].indices == (3, 8)
    assert len(results[2].vectors) == 30
    await engine.close()


@pytest.mark.parametrize("kind", ["fake", "torch"])
async def test_a_step_out_of_memory_is_run_in_parts(kind, gate, request, fragile):
    engine = fragile if kind == "torch" else await load(kind, gate, request)
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
