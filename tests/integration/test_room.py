"""The glance at whether there is room agrees with what decides, and costs little."""

import asyncio
import random

import pytest

from vecfleet.common import codec, keys, payloads
from vecfleet.common.admission import Admission
from vecfleet.common.errors import QueueFull
from vecfleet.common.queue_client import NewJob, QueueClient, Route
from vecfleet.common.room import Room

QUEUE = keys.embed_queue("0123456789abcdef", "bulk", "acme")
MERGE = keys.merge_queue("c0ffee" * 5 + "00", "acme")
BOUNDS = Admission(
    max_tokens=100_000,
    max_bytes=100_000,
    max_merge_bytes=100_000,
    max_shared_bytes=200_000,
    max_unmerged_bytes=200_000,
    max_dead_bytes=200_000,
)
DATA = codec.pack_call(payloads.EMBED, {"texts": ["a"]})
ROUTE = Route(submission="s", merge_queue=str(MERGE))


async def say(client, tokens=0, size=0, of_all=0, unmerged=0, parked=0, unmerged_of_all=0, dead=0):
    """Have Redis say that so much waits."""
    await client.flushdb()
    await client.hset(keys.load(QUEUE), mapping={"tokens": tokens, "bytes": size})
    await client.hset(keys.load_of_all(QUEUE), mapping={"bytes": of_all})
    await client.hset(keys.load(MERGE), mapping={"bytes": unmerged, "parked_bytes": parked})
    await client.hset(keys.load_of_all(MERGE), mapping={"bytes": unmerged_of_all})
    await client.hset(keys.DEAD_BYTES, mapping={"acme": dead, "*": dead})


async def both(client, tokens=1):
    """What the glance says and what an enqueue says, '' where there is room."""
    queues, told = QueueClient(client, BOUNDS), []
    for attempt in (
        lambda: queues.check_room(QUEUE, MERGE, tokens),
        lambda: queues.enqueue(QUEUE, [NewJob("j", DATA, tokens)], ROUTE),
    ):
        try:
            await attempt()
            told.append("")
        except QueueFull as error:
            told.append(error.message)
    return told


@pytest.mark.parametrize(
    ("waiting", "why"),
    [
        ({}, ""),
        ({"tokens": 99_999}, ""),
        ({"tokens": 100_000}, "the bulk queue of this model holds 100000 tokens"),
        ({"tokens": 9, "size": 99_999}, "the bulk queue of this model"),
        ({"size": 60_000, "of_all": 150_000}, "the bulk queues of all tenants"),
        ({"unmerged": 60_000, "parked": 50_000}, "wait to be merged"),
        ({"unmerged": 60_000, "unmerged_of_all": 150_000}, "wait to be merged"),
        ({"dead": 150_000}, "dead letter"),
    ],
)
async def test_what_is_full_is_seen(redis_async, waiting, why):
    await say(redis_async, **waiting)
    glance, enqueued = await both(redis_async)
    assert glance == enqueued
    assert why in glance
    assert bool(why) == bool(glance)


async def test_what_is_refused_at_a_glance_would_be_refused(redis_async):
    rng = random.Random(7)
    seen = set()
    for _ in range(300):
        amounts = [rng.choice((0, 1, rng.randrange(200_000))) for _ in range(7)]
        await say(redis_async, *amounts)
        glance, enqueued = await both(redis_async, tokens=rng.randrange(1, 100_000))
        assert enqueued or not glance, amounts
        seen.add((bool(glance), bool(enqueued)))
    assert {(True, True), (False, False)} <= seen


async def test_many_share_a_look(redis_async):
    now_s = 1.0
    room = Room(redis_async, BOUNDS, lambda: now_s)
    await redis_async.config_resetstat()
    await asyncio.gather(*(room.verdict(QUEUE, MERGE, 1) for _ in range(20)))
    await say(redis_async, tokens=100_000)
    assert (await room.verdict(QUEUE, MERGE, 1))[0] == b"ok"
    assert (await redis_async.info("commandstats"))["cmdstat_hmget"]["calls"] == 5
    now_s += 0.2
    assert (await room.verdict(QUEUE, MERGE, 1))[0] == b"full"


@pytest.mark.parametrize("name", [keys.load(QUEUE), keys.load_of_all(MERGE), keys.DEAD_BYTES])
async def test_what_others_made_of_a_record_is_an_enqueues_to_find(redis_async, name):
    await redis_async.hset(name, mapping={"bytes": "x", "tokens": "y", "acme": "z", "*": ""})
    await QueueClient(redis_async, BOUNDS).check_room(QUEUE, MERGE, 1)
    await redis_async.delete(name)
    await redis_async.set(name, "x")
    await QueueClient(redis_async, BOUNDS).check_room(QUEUE, MERGE, 1)
