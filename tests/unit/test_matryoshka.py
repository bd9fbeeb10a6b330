"""Shorter vectors: which models give them, the cut, and what the embed handler makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vecfleet.common import codec, keys
from vecfleet.common.errors import ConfigError, EngineFailed, InvalidInput
from vecfleet.common.redis_client import connect
from vecfleet.worker.embed_handler import EmbedHandler
from vecfleet.worker.fake_engine import NAN, POISON, FakeEngine, FakeSettings, fake_vector
from vecfleet.worker.job import Answer, ClaimedJob, HandOn
from vecfleet.worker.ledger import Ledger
from vecfleet.worker.matryoshka import Matryoshka, read_matryoshka, shortened
from vecfleet.worker.quarantine import Quarantine
from vecfleet.worker.shard import Shard

DIMENSION = 32
UID = "c0ffee" * 5 + "00"
QUARANTINE = Quarantine(Ledger(connect("redis://127.0.0.1:1"), "w1"), {})  # of no use here
QUERY = "Instruct: Search the web\nQuery:"


def cut(vectors: Any, dimensions: int) -> Any:
    """What numpy says the cut is."""
    first = np.asarray(vectors, np.float64)[:, :dimensions]
    return first / np.sqrt((first**2).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("dimensions", [1, 7, 31])
def test_the_cut_is_the_first_numbers_at_length_one(dimensions):
    vectors = np.random.default_rng(1).standard_normal((50, DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = shortened(vectors, dimensions)
    assert found.dtype == np.float32
    assert found.shape == (50, dimensions)
    np.testing.assert_allclose(found, cut(vectors, dimensions), atol=1e-6)


def test_vectors_of_the_models_own_length_stay_as_they_are():
    vectors = np.eye(3, dtype=np.float32)
    assert shortened(vectors, 3) is vectors


def test_a_vector_of_which_nothing_is_left_is_named():
    with pytest.raises(EngineFailed) as raised:
        shortened(np.eye(4, dtype=np.float32), 2)
    assert raised.value.indices == (2, 3)


def test_a_vector_of_which_too_little_is_left_is_named():
    """So little that it cannot be brought to length 1 in float32."""
    vectors = np.eye(4, dtype=np.float32)
    vectors[2, 0], vectors[3, 0] = 3e-23, np.nan
    with pytest.raises(EngineFailed) as raised:
        shortened(vectors, 2)
    assert raised.value.indices == (2, 3)


COMMIT = "5cf2132abc99cad020ac570b19d031efec650f2b"
QWEN_CACHE = f"hub/models--Qwen--Qwen3-Embedding-4B/snapshots/{COMMIT}"


@pytest.mark.parametrize(
    ("name", "config", "sentence", "expected"),
    [
        ("some/model", {}, {}, None),
        ("some/model", {"is_matryoshka": False}, {"truncate_dim": None}, None),
        ("some/model", {"is_matryoshka": True}, {}, Matryoshka()),
        ("some/model", {"matryoshka_dimensions": [256, 64, 1024]}, {}, Matryoshka((64, 256))),
        ("some/model", {"matryoshka_dimensions": [1024]}, {}, None),
        ("some/model", {}, {"truncate_dim": 256}, Matryoshka((256,))),
        ("some/model", {}, {"truncate_dim": 1024}, None),
        ("Qwen/Qwen3-Embedding-0.6B", {}, {}, Matryoshka(least=32)),
        ("/models/Qwen3-Embedding-8B", {"is_matryoshka": True}, {}, Matryoshka(least=32)),
        (f"/{QWEN_CACHE}", {}, {}, Matryoshka(least=32)),
        ("me/my-Qwen3-Embedding-0.6B-on-cats", {}, {}, None),
        ("mixedbread-ai/mxbai-embed-large-v1", {}, {}, Matryoshka()),
        ("Snowflake/snowflake-arctic-embed-l-v2.0", {}, {}, Matryoshka((256,))),
        ("Snowflake/snowflake-arctic-embed-l", {}, {}, None),
    ],
)
def test_a_models_files_or_its_name_say_what_it_is_trained_for(
    tmp_path, name, config, sentence, expected
):
    path = tmp_path / name.strip("/")
    assert read_matryoshka(name, path, config, sentence, 1024) == expected


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"matryoshka_dimensions": 64}, {}),
        ({"matryoshka_dimensions": [64, "128"]}, {}),
        ({"matryoshka_dimensions": [0]}, {}),
        ({}, {"truncate_dim": "64"}),
    ],
)
def test_files_that_say_it_wrongly_stop_the_start(tmp_path, config, sentence):
    with pytest.raises(ConfigError, match="whole numbers"):
        read_matryoshka("some/model", tmp_path, config, sentence, 1024)


@pytest.fixture
async def engine():
    engine = await FakeEngine.load(FakeSettings(dimension=DIMENSION))
    engine.card = replace(
        engine.card, matryoshka=True, matryoshka_least=4, prompts={"query": QUERY, "document": ""}
    )
    yield engine
    await engine.close()


def job(payload: dict[str, Any], **more: Any) -> ClaimedJob:
    queue = keys.embed_queue("0" * 16, "bulk")
    return ClaimedJob("j", "e", queue, "vecfleet.embed", payload, 1, 0, 0, 1, **more)


async def answer(engine: FakeEngine, **payload: Any) -> Any:
    outcome = await EmbedHandler(engine, QUARANTINE)(job({"texts": ["one", "two"], **payload}))
    assert isinstance(outcome, Answer)
    vectors = np.frombuffer(outcome.body["vectors"], "<f4")
    return vectors.reshape(2, outcome.body["dimension"])


async def test_texts_get_vectors_of_the_length_that_was_asked_for(engine):
    full = await answer(engine)
    assert full.shape == (2, DIMENSION)
    assert np.array_equal(await answer(engine, dimensions=DIMENSION), full)
    np.testing.assert_allclose(await answer(engine, dimensions=5), cut(full, 5), atol=1e-6)


@pytest.mark.parametrize("dimensions", [0, -1, 3, DIMENSION + 1, True, "8", 8.0, [8]])
async def test_other_lengths_are_refused(engine, dimensions):
    with pytest.raises(InvalidInput, match=f"from 4 to {DIMENSION}") as raised:
        await answer(engine, dimensions=dimensions)
    assert raised.value.field == "dimensions"


async def test_a_model_that_is_not_trained_for_it_cuts_nothing(engine):
    engine.card = replace(engine.card, matryoshka=False)
    with pytest.raises(InvalidInput, match="not trained for shorter vectors"):
        await answer(engine, dimensions=8)


@pytest.mark.parametrize(
    ("asked", "before"),
    [
        ({"prompt_name": "query"}, QUERY),
        ({"prompt_name": "document"}, ""),
        ({"prompt": "say: "}, "say: "),
        ({"instruction": "Find laws"}, "Instruct: Find laws\nQuery:"),
    ],
)
async def test_texts_are_read_after_what_was_asked_for(engine, asked, before):
    found = await answer(engine, **asked)
    expected = [fake_vector(before + text, DIMENSION) for text in ("one", "two")]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"prompt": "a", "prompt_name": "query"}, "prompt_name"),
        ({"prompt_name": "query", "instruction": "Find laws"}, "instruction"),
        ({"prompt_name": "nope"}, "prompt_name"),
        ({"instruction": ""}, "instruction"),
    ],
)
async def test_two_prompts_or_an_unknown_one_are_refused(engine, asked, field):
    with pytest.raises(InvalidInput) as raised:
        await answer(engine, **asked)
    assert raised.value.field == field


def block(engine: FakeEngine, texts: list[str], **more: Any) -> ClaimedJob:
    ids = [f"d{i}" for i in range(len(texts))]
    payload = {"ids": ids, "texts": texts, "uid": UID, "space": engine.card.space, **more}
    return job(payload, merge_queue="vf.-.merge.x.bulk", version=7)


async def test_a_block_becomes_a_shard_of_its_collections_dimensions(engine):
    texts = ["a", "b", POISON, "c"]
    outcome = await EmbedHandler(engine, QUARANTINE)(block(engine, texts, dimensions=5))
    assert isinstance(outcome, HandOn)
    _, (data,), _ = codec.unpack_call(outcome.data)
    shard = Shard.parse(data)
    assert shard.dimension == 5
    full = [fake_vector(text, DIMENSION) for text in ("a", "b", "c")]
    np.testing.assert_allclose(shard.rows.vectors, cut(full, 5), atol=1e-3)
    # What is kept apart and tried again must come out as long as its neighbours.
    _, (apart,), _ = codec.unpack_call(outcome.refused[0].data)
    assert (apart["texts"], apart["dimensions"]) == ([POISON], 5)


async def test_a_block_that_says_nothing_keeps_the_models_dimension(engine):
    outcome = await EmbedHandler(engine, QUARANTINE)(block(engine, ["a"]))
    assert isinstance(outcome, HandOn)
    _, (data,), _ = codec.unpack_call(outcome.data)
    assert Shard.parse(data).dimension == DIMENSION


async def test_a_block_whose_cut_leaves_nothing_is_refused_text_by_text(engine, monkeypatch):
    zeros = np.eye(DIMENSION, dtype=np.float32)[[0, 9]]
    embed = engine.embed

    async def embed_two(texts, **given):
        found = await embed(texts, **given)
        return replace(found, vectors=zeros[["ab".index(text) for text in texts]])

    monkeypatch.setattr(engine, "embed", embed_two)
    outcome = await EmbedHandler(engine, QUARANTINE)(block(engine, ["a", "b"], dimensions=5))
    assert isinstance(outcome, HandOn)
    assert [(entry.id, entry.error.code) for entry in outcome.refused] == [("d1", "engine_failed")]


async def test_each_refused_text_is_told_its_own_reason(engine):
    outcome = await EmbedHandler(engine, QUARANTINE)(block(engine, ["a", NAN, "b", POISON]))
    told = {entry.id: entry.error.message for entry in outcome.refused}
    assert told.keys() == {"d1", "d3"}
    assert "NaN" in told["d1"] and "poison" in told["d3"]


async def test_a_block_for_dimensions_the_model_does_not_give_fails_whole(engine):
    with pytest.raises(InvalidInput) as raised:
        await EmbedHandler(engine, QUARANTINE)(block(engine, ["a"], dimensions=DIMENSION + 1))
    assert raised.value.field == "dimensions"
