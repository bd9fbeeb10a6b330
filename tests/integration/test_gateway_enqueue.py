"""Enqueue calls that come while another is under way go together, and lose nothing by it."""

import asyncio

import pytest
from servers import eventually

from vecfleet.common import codec, keys, payloads
from vecfleet.common.admission import Admission
from vecfleet.common.errors import InvalidInput, QueueFull, RedisUnavailable
from vecfleet.common.limits import MAX_BLOCKS
from vecfleet.common.queue_client import NewJob, QueueClient, Route
from vecfleet.common.redis_client import connect_async

QUEUE = keys.embed_queue("0123456789abcdef", "interactive")
DATA = codec.pack_call(payloads.EMBED, {"texts": ["a"]})


def job(name, tokens=1):
    return NewJob(name, DATA, tokens)


async def evalsha_calls(client):
    return (await client.info("commandstats")).get("cmdstat_evalsha", {}).get("calls", 0)


async def test_calls_go_together_and_each_learns_its_own_part(redis_async):
    queues = QueueClient(redis_async)
    await queues.enqueue(QUEUE, [job("known")], Route(box="b"))
    before = await evalsha_calls(redis_async)
    told = await asyncio.gather(
        *(queues.enqueue(QUEUE, [job(f"j{i}"), job("known")], Route(box="b")) for i in range(100))
    )
    assert all(admitted.numbers == (0, -1) for admitted in told)
    assert await redis_async.llen(keys.queue_list(QUEUE)) == 101
    assert (await evalsha_calls(redis_async)) - before <= 4
    assert (await redis_async.hget(keys.load(QUEUE), "jobs")) == b"101"


async def test_other_routes_and_submissions_go_by_themselves(redis_async):
    queues = QueueClient(redis_async)
    await queues.enqueue(QUEUE, [job("warm")])
    before = await evalsha_calls(redis_async)
    await asyncio.gather(
        queues.enqueue(QUEUE, [job("a")], Route(box="one")),
        queues.enqueue(QUEUE, [job("b")], Route(box="two")),
        queues.enqueue(QUEUE, [job("c")], Route(submission="s")),
        queues.enqueue(QUEUE, [job("d")], Route(submission="s")),
    )
    assert (await evalsha_calls(redis_async)) - before == 4


async def test_what_fits_is_admitted_when_all_together_do_not(redis_async):
    queues = QueueClient(redis_async, Admission(max_tokens=50))
    told = await asyncio.gather(
        *(queues.enqueue(QUEUE, [job(f"j{i}", 10)], Route(box="b")) for i in range(9)),
        return_exceptions=True,
    )
    full = [answer for answer in told if isinstance(answer, QueueFull)]
    assert len(full) == 4
    assert len({id(error) for error in full}) == 4
    assert await redis_async.hget(keys.load(QUEUE), "tokens") == b"50"


async def test_a_caller_that_gives_up_does_not_take_others_with_it(redis_async):
    queues = QueueClient(redis_async)
    tasks = [
        asyncio.create_task(queues.enqueue(QUEUE, [job(f"j{i}")], Route(box="b")))
        for i in range(10)
    ]
    await asyncio.sleep(0)
    tasks[0].cancel()  # the one whose call is under way
    tasks[5].cancel()  # one that waits
    told = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(answer, asyncio.CancelledError) for answer in told].count(True) == 2

    async def all_there():
        waiting = set(await redis_async.lrange(keys.queue_list(QUEUE), 0, -1))
        return waiting >= {b"j%d" % i for i in range(10) if i not in (0, 5)} and waiting

    assert b"j5" not in await eventually(all_there)


async def test_redis_away_is_told_to_every_caller_and_over_when_it_is_back(redis_server_factory):
    server = redis_server_factory()
    async with connect_async(server.url) as client:
        queues = QueueClient(client)
        server.stop()
        told = await asyncio.gather(
            *(queues.enqueue(QUEUE, [job(f"j{i}")], Route(box="b")) for i in range(5)),
            return_exceptions=True,
        )
        assert all(isinstance(answer, RedisUnavailable) for answer in told)
        server.start()
        admitted = await queues.enqueue(QUEUE, [job("later")], Route(box="b"))
    assert admitted.numbers == (0,)


@pytest.mark.parametrize("count", [1, 65, 200])
async def test_any_number_together_keeps_their_order(redis_async, count):
    queues = QueueClient(redis_async)
    await asyncio.gather(
        *(queues.enqueue(QUEUE, [job(f"j{i}")], Route(box="b")) for i in range(count))
    )
    waiting = await redis_async.lrange(keys.queue_list(QUEUE), 0, -1)
    assert waiting == [b"j%d" % i for i in range(count)]


@pytest.mark.parametrize(
    ("block", "tokens", "documents"),
    [(MAX_BLOCKS, 1, 1), (2**31, 1, 1), (-1, 1, 1), (0.5, 1, 1), (0, 2**31, 1), (0, 1, -1)],
)
async def test_numbers_that_cannot_be_are_refused_and_nothing_is_written(
    redis_async, block, tokens, documents
):
    queues = QueueClient(redis_async)
    jobs = [job("good"), NewJob("bad", DATA, tokens, block, documents)]
    with pytest.raises(InvalidInput, match="below 16777216") as raised:
        await queues.enqueue(QUEUE, jobs, Route(submission="s"))
    assert raised.value.field == "block"
    assert await redis_async.keys() == []
    last = NewJob("last", DATA, 1, MAX_BLOCKS - 1, 1)
    assert (await queues.enqueue(QUEUE, [last], Route(submission="s"))).numbers == (0,)
