"""A text that the tokeniser cannot read fails alone."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from vecfleet.common.errors import EngineFailed, TextsTooLong
from vecfleet.worker.calls import encode_each, failure_of
from vecfleet.worker.engine import Priority
from vecfleet.worker.fake_engine import FakeEngine, FakeSettings, fake_vector

ODD = "[[odd]]"
PANIC = "[[panic]]"
EXIT = "[[exit]]"
BULK, INTERACTIVE = Priority.BULK, Priority.INTERACTIVE


class PickyEngine(FakeEngine):
    def _encode(self, payloads, truncate):
        if any(ODD in text for payload in payloads for text in payload):
            raise RuntimeError("no token for this")
        if any(PANIC in text for payload in payloads for text in payload):
            panic()
        if any(EXIT in text for payload in payloads for text in payload):
            raise SystemExit
        return super()._encode(payloads, truncate)


def panic() -> None:
    """As tokenizers do, in Rust, where they find themselves at fault."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.FixedLength(length=0)
    tokenizer.encode("a text")


@pytest.fixture
async def engine():
    engine = await PickyEngine.load(FakeSettings(max_tokens=8))
    yield engine
    await engine.close()


@pytest.mark.parametrize("count", [3, 300])  # encoded by the step thread, and by an encoder
@pytest.mark.parametrize("priority", [BULK, INTERACTIVE])
async def test_a_text_that_cannot_be_encoded_is_named_and_its_neighbours_run(
    engine, priority, count
):
    texts = [f"text {n}" for n in range(count)]
    texts[1] = ODD
    before = engine.stats.texts
    with pytest.raises(EngineFailed) as raised:
        await engine.embed(texts, priority=priority)
    assert raised.value.indices == (1,)
    assert "no token" in raised.value.message
    assert engine.stats.texts - before == count - 1


async def test_a_call_of_nothing_else_ends_at_once(engine):
    with pytest.raises(EngineFailed) as raised:
        await engine.embed([ODD] * 200, priority=BULK)
    assert raised.value.indices == tuple(range(200))
    assert engine.stats.steps == 0
    found = await engine.embed(["fine"], priority=BULK)
    np.testing.assert_allclose(found.vectors[0], fake_vector("fine", 32))


def test_a_panic_is_no_exception():
    with pytest.raises(BaseException, match="chunk size") as raised:
        panic()
    assert not isinstance(raised.value, Exception)


@pytest.mark.parametrize("count", [3, 300])
@pytest.mark.parametrize("priority", [BULK, INTERACTIVE])
async def test_a_text_on_which_the_tokeniser_panics_is_named_as_well(engine, priority, count):
    texts = [f"text {n}" for n in range(count)]
    texts[1] = PANIC
    with pytest.raises(EngineFailed, match="PanicException") as raised:
        await engine.embed(texts, priority=priority)
    assert raised.value.indices == (1,)
    assert len((await engine.embed(["fine"] * count, priority=priority)).vectors) == count


@pytest.mark.parametrize("count", [3, 300])
async def test_whatever_else_ends_the_encoding_of_a_call_fails_it(engine, count):
    with pytest.raises(EngineFailed, match="SystemExit") as raised:
        await engine.embed([EXIT] * count, priority=BULK)
    assert raised.value.indices == ()
    assert len((await engine.embed(["fine"] * count, priority=BULK)).vectors) == count


async def test_texts_that_are_too_long_are_told_beside_one_that_cannot_be_encoded(engine):
    with pytest.raises(TextsTooLong) as raised:
        await engine.embed(["fine", ODD, "one two " * 9], priority=BULK, truncate=False)
    assert raised.value.indices == (2,)


def test_one_by_one_only_where_it_is_needed():
    calls = []

    def encode(texts):
        calls.append(list(texts))
        if "bad" in texts:
            raise ValueError("bad")
        return list(texts)

    assert encode_each(encode, ["a", "b"]) == ["a", "b"]
    assert calls == [["a", "b"]]
    good, bad = encode_each(encode, ["a", "bad"])
    assert (good, str(bad)) == ("a", "bad")


def test_each_text_has_its_own_reason():
    error = failure_of({7: ValueError("seven"), 3: KeyError("three")})
    assert error.indices == (3, 7)
    assert "three" in error.each[0] and "seven" in error.each[1]
    assert "2 texts" in error.message and "three" in error.message
    assert failure_of({}) is None
