"""Calls that would have to wait too long are refused at once, by what the workers say they do."""

import asyncio

import pytest
from gateway_responder import CARD, Responder
from servers import eventually

from vecfleet.common import codec, keys, payloads
from vecfleet.common.admission import Admission
from vecfleet.common.errors import QueueFull
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.limits import WINDOW_TOKENS
from vecfleet.common.queue_client import NewJob, QueueClient, Route
from vecfleet.common.redis_client import connect_async

QUEUE = keys.embed_queue(CARD.space, "interactive")
DATA = codec.pack_call(payloads.EMBED, {"texts": ["a"]})
RATE = 20_000.0  # tokens a second
LONG = "word " * 20_000  # about 25,000 tokens


def job(name, tokens):
    return NewJob(name, DATA, tokens)


async def tell_rate(client, rate=RATE):
    told = {"tokens_per_s": str(rate), "was_full": int(rate == RATE)}
    await client.hset(keys.worker("responder"), mapping=told)


async def waiting(client, lane="interactive"):
    return int(await client.hget(keys.load(keys.embed_queue(CARD.space, lane)), "tokens") or 0)


async def test_what_is_served_before_decides_not_the_call_itself(redis_async):
    queues = QueueClient(redis_async)
    patient = Route(box="b", max_ahead=100)
    await queues.enqueue(QUEUE, [job("large", 5000)], patient)
    with pytest.raises(QueueFull, match="5000 tokens wait before this call"):
        await queues.enqueue(QUEUE, [job("small", 1)], patient)
    assert not await redis_async.exists(keys.job("small"))
    assert await waiting(redis_async) == 5000
    await queues.enqueue(QUEUE, [job("small", 1)], Route(box="b", max_ahead=5000))


async def test_the_same_call_again_is_not_late(redis_async):
    queues = QueueClient(redis_async)
    route = Route(box="b", max_ahead=100)
    await queues.enqueue(QUEUE, [job("one", 5000)], route)
    assert (await queues.enqueue(QUEUE, [job("one", 5000)], route)).numbers == (-1,)


async def test_other_tenants_count_as_far_as_they_take_turns(redis_async):
    queues = QueueClient(redis_async)
    route = Route(box="b", max_ahead=100)
    mine, theirs = (keys.embed_queue(CARD.space, "interactive", name) for name in ("me", "them"))
    await queues.enqueue(theirs, [job("flood", 1_000_000)])
    await queues.enqueue(mine, [job("first", 60)], route)  # nothing of mine waits: it comes next
    with pytest.raises(QueueFull, match="120 tokens wait before"):  # 60 of mine, 60 of theirs
        await queues.enqueue(mine, [job("second", 60)], route)


async def test_a_flood_of_queries_is_refused_until_it_is_over(redis_url, redis_async):
    most = Admission(max_wait_s=4.0)
    client = connect_async(redis_url)
    async with Responder(redis_async) as worker, FleetClient(client, admission=most) as fleet:
        await tell_rate(redis_async)
        await worker.hold()
        calls = [asyncio.create_task(fleet.embed([LONG], timeout_s=60)) for _ in range(10)]

        async def all_decided():
            refused = sum(call.done() for call in calls)
            return refused + await redis_async.llen(keys.queue_list(QUEUE)) == 10

        await eventually(all_decided)
        refused = [call.exception() for call in calls if call.done()]
        # 4 s of 20,000 tokens: four calls of 25,000 come in, the fifth finds too much before it.
        assert len(refused) == 6
        assert all(isinstance(error, QueueFull) for error in refused)
        assert all(1 <= error.retry_after_s <= 60 for error in refused)
        worker.go.set()
        told = [await call for call in calls if not (call.done() and call.exception())]
        assert len(told) == 4
        assert len((await fleet.embed(["now"])).vectors) == 4 * CARD.dimension


@pytest.mark.parametrize("rate", [0.0, 1.0])
async def test_a_worker_that_was_never_full_takes_a_burst(redis_url, redis_async, rate):
    """Its rate is not known, or is that of single queries: it takes in a window's worth anyway."""
    client = connect_async(redis_url)
    async with Responder(redis_async) as worker, FleetClient(client) as fleet:
        await tell_rate(redis_async, rate)
        await worker.hold()
        texts = [LONG[: WINDOW_TOKENS // 4]] * 3  # four bytes a token, so 3/16 of a window together
        calls = [asyncio.create_task(fleet.embed(texts)) for _ in range(5)]

        async def all_wait():
            return await redis_async.llen(keys.queue_list(QUEUE)) == 5

        await eventually(all_wait)
        worker.go.set()
        assert len(await asyncio.gather(*calls)) == 5
