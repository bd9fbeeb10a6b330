"""Records in Redis that somebody damaged: one of them costs itself, and nothing else."""

from __future__ import annotations

import pytest
from gateway_responder import CARD, Responder

from vecfleet.common import codec, keys
from vecfleet.common.collection import Collection, CollectionSpec
from vecfleet.common.directory import Directory
from vecfleet.common.errors import UnknownCollection, UnknownSubmission
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.submission import Submissions

GOOD = Collection("books", "c0ffee" * 5 + "00", CollectionSpec(CARD.name, CARD.space, 8))
WIRE = GOOD.to_wire()
ID = "e" * 32
SUBMISSION = {"state": "open", "tenant": "-", "created_ms": "1"}


@pytest.mark.parametrize(
    "damage",
    [
        b"\xc1",
        b"",
        b"\x80\x04N.",
        codec.dumps([]),
        codec.dumps({"x": 1}),
        codec.dumps({**WIRE, "spec": None}),
        codec.dumps({**WIRE, "uid": 7}),
        codec.dumps({**WIRE, "created_s": b"x"}),
    ],
)
async def test_a_collections_record_is_left_out_and_not_there(redis_async, damage):
    await redis_async.set(keys.PUBLISHED, 1)
    records = {"books": codec.dumps(WIRE), "evil": damage}
    await redis_async.hset(keys.collections(), mapping=records)
    directory = Directory(redis_async)
    assert await directory.collections() == [GOOD]
    assert await directory.collection("books") == GOOD
    with pytest.raises(UnknownCollection, match="cannot be read"):
        await directory.collection("evil")


async def test_a_collections_record_that_is_changed_is_read_anew(redis_async):
    directory = Directory(redis_async)
    for uid in ("a" * 32, "b" * 32):
        record = codec.dumps({**WIRE, "uid": uid})
        await redis_async.hset(keys.collections(), "books", record)
        assert (await directory.collection("books")).uid == uid


@pytest.mark.parametrize(
    "damage",
    [
        b"\xc1",
        codec.dumps({"name": "evil"}),
        codec.dumps({**CARD.to_wire(), "name": "evil", "tasks": []}),
        codec.dumps({**CARD.to_wire(), "name": "evil", "tasks": None}),
        codec.dumps({**CARD.to_wire(), "name": 7}),
    ],
)
@pytest.mark.parametrize("seen", [9e15, float("inf")])
async def test_a_models_card_is_left_out(redis_async, damage, seen):
    await Responder(redis_async).announce()
    await redis_async.set(keys.model("evil"), damage)
    await redis_async.zadd(keys.MODELS, {"evil": seen, b"\xff": seen})
    directory = Directory(redis_async)
    assert [model.card for model in await directory.models()] == [CARD]
    assert (await directory.find(None, "embed")).card == CARD


async def test_numbers_that_are_none_count_as_nothing(redis_async):
    await Responder(redis_async).announce()
    await redis_async.hset(keys.worker("responder"), "tokens_per_s", "nan")
    queue = keys.embed_queue(CARD.space, "bulk")
    await redis_async.hset(keys.load(queue), mapping={"tokens": "many", "jobs": "x"})
    await redis_async.sadd(keys.QUEUES, keys.queue_list(queue), b"rq:queue:vf.\xff")
    directory = Directory(redis_async)
    assert [model.tokens_per_s for model in await directory.models()] == [0.0]
    assert await directory.tokens_ahead(queue) == 0
    state = await FleetClient(redis_async).state()
    assert sum(load.tokens for load in state.queues) == 0


@pytest.mark.parametrize(
    "damage",
    [
        {"created_ms": None},
        {"created_ms": "now"},
        {"created_ms": "9" * 5000},
        {"documents": "x"},
        {"committed_documents": "1.5"},
        {"done_ms": b"\xff"},
        {"state": None},
        {"state": "evil"},
        {"tenant": b"\xff"},
    ],
)
async def test_a_submissions_record_is_not_there(redis_async, damage):
    fields = {name: value for name, value in {**SUBMISSION, **damage}.items() if value is not None}
    await redis_async.hset(keys.submission(ID), mapping=fields)
    await redis_async.hset(keys.submission("f" * 32), mapping=SUBMISSION)
    submissions = Submissions(redis_async)
    with pytest.raises(UnknownSubmission, match="cannot be read"):
        await submissions.get(ID)
    with pytest.raises(UnknownSubmission, match="cannot be read"):
        await submissions.cancel(ID)
    assert [found.id for found in await submissions.unfinished()] == ["f" * 32]


@pytest.mark.parametrize("key", [keys.submission(ID), f"{keys.submission(ID)}:errors"])
async def test_a_submission_of_another_type_is_not_there(redis_async, key):
    await redis_async.hset(keys.submission(ID), mapping=SUBMISSION)
    await redis_async.delete(key)
    await redis_async.set(key, "x")
    with pytest.raises(UnknownSubmission, match="cannot be read"):
        await Submissions(redis_async).get(ID, with_errors=True)


async def test_what_cannot_be_told_of_a_submission_is_left_out(redis_async):
    told = {"block": 0, "place": 1, "id": "a", "code": "empty_text", "message": "it is empty"}
    await redis_async.hset(keys.submission(ID), mapping=SUBMISSION)
    damage = [b"\xc1", codec.dumps(7), codec.dumps({"id": b"raw"}), codec.dumps(told)]
    await redis_async.rpush(f"{keys.submission(ID)}:errors", *damage)
    assert (await Submissions(redis_async).get(ID, with_errors=True)).errors == (told,)
