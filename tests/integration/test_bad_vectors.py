"""A text of which the model makes no vector of length 1 is refused alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vecfleet.common import codec, keys, payloads
from vecfleet.common.errors import EngineFailed
from vecfleet.common.queue_client import NewJob, Route
from vecfleet.worker.embed_handler import EmbedHandler
from vecfleet.worker.engine import Embeddings
from vecfleet.worker.fake_engine import ZERO, FakeEngine, FakeSettings
from vecfleet.worker.job import Commit, HandOn
from vecfleet.worker.ledger import Ask, Ledger
from vecfleet.worker.proven_engine import ProvenEngine
from vecfleet.worker.quarantine import Quarantine
from vecfleet.worker.shard import Shard

UID = "c0ffee"
CUT = 16
HOLLOW = "nothing in the first half"


class HollowEngine(FakeEngine):
    """Its vector of a hollow text is of length 1, and has nothing in what a cut leaves."""

    async def embed(self, texts: Sequence[str], **options: Any) -> Embeddings:
        found = await super().embed(texts, **options)
        for row, text in zip(found.vectors, texts, strict=True):
            if HOLLOW in text:
                row[:CUT] = 0.0
                row /= np.linalg.norm(row)
        return found


@pytest.fixture
async def engine():
    engine = await HollowEngine.load(FakeSettings())
    engine.card = replace(engine.card, matryoshka=True)
    yield ProvenEngine(engine)
    await engine.close()


@pytest.fixture
def claimed(client, queues, engine):
    """Puts a call into a queue, and claims it as what has killed a worker or has not."""

    async def claim(payload: dict[str, Any], is_suspect: bool):
        queue = keys.embed_queue(engine.card.space, "bulk")
        job = NewJob("j", codec.pack_call(payloads.EMBED, payload), 10, 0, len(payload["texts"]))
        await queues.enqueue(queue, [job], Route(merge_queue=str(keys.merge_queue(UID))))
        client.hset(keys.job("j"), "vf_attempts", int(is_suspect))
        ledger = Ledger(client, "w1")
        (job,) = ledger.claim([Ask(queue, 1, 999)])
        return await EmbedHandler(engine, Quarantine(ledger, {}))(job)

    return claim


def block(engine: ProvenEngine, texts: list[str], **more: Any) -> dict[str, Any]:
    ids = [f"d{place}" for place in range(len(texts))]
    said = {"uid": UID, "space": engine.card.space, "versions": [1] * len(texts)}
    return {**said, "ids": ids, "texts": texts, **more}


BAD = pytest.mark.parametrize(
    ("bad", "dimensions"), [(ZERO, 32), (f"two {ZERO}", CUT), (HOLLOW, CUT)]
)
WAYS = pytest.mark.parametrize("is_suspect", [False, True], ids=["ordinary", "suspect"])


@BAD
@WAYS
async def test_its_neighbours_are_delivered(claimed, engine, bad, dimensions, is_suspect):
    texts = ["a", f"{bad} 1", "b", f"{bad} 2", "c"]
    outcome = await claimed(block(engine, texts, dimensions=dimensions), is_suspect)
    assert isinstance(outcome, HandOn)
    assert [(entry.id, entry.error.code) for entry in outcome.refused] == [
        ("d1", "engine_failed"),
        ("d3", "engine_failed"),
    ]
    _, (data,), _ = codec.unpack_call(outcome.data)
    shard = Shard.parse(data)
    assert [shard.rows.id(row) for row in range(len(shard))] == ["d0", "d2", "d4"]
    assert shard.dimension == dimensions


@WAYS
async def test_a_block_of_nothing_else_goes_without_any(claimed, engine, is_suspect):
    outcome = await claimed(block(engine, [ZERO, f"{ZERO} {ZERO}"]), is_suspect)
    assert isinstance(outcome, Commit)
    assert (outcome.documents, len(outcome.refused)) == (0, 2)


@BAD
@WAYS
async def test_who_waits_is_told_the_place(claimed, engine, bad, dimensions, is_suspect):
    with pytest.raises(EngineFailed) as raised:
        await claimed({"texts": ["a", bad, "b"], "dimensions": dimensions}, is_suspect)
    assert raised.value.indices == (1,)
    assert raised.value.message
