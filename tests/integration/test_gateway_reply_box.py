"""A reply box gives each reply to whoever waits, and closes at any moment."""

import asyncio
from itertools import pairwise

import pytest
from servers import eventually

from vecfleet.common import codec, keys
from vecfleet.common.queue_client import NewJob, QueueClient, Route
from vecfleet.common.redis_client import connect_async
from vecfleet.common.reply_box import ReplyBox


async def test_a_box_closes_at_any_moment_of_its_reading(redis_url, redis_async):
    async with connect_async(redis_url) as client:
        for turns in range(200):
            box = ReplyBox(client)
            await box.open()
            for _ in range(turns % 20):
                await asyncio.sleep(0)
            async with asyncio.timeout(20):
                await box.close()
    assert not await redis_async.exists(keys.alive(box.name))


async def test_replies_that_come_together_are_all_delivered(redis_url, redis_async):
    async with connect_async(redis_url) as client:
        box = ReplyBox(client)
        await box.open()
        futures = [box.expect(f"j{i}") for i in range(300)]
        await redis_async.rpush(
            keys.reply(box.name), *(codec.dumps([f"j{i}", "ok", i]) for i in range(300))
        )
        async with asyncio.timeout(20):
            assert await asyncio.gather(*futures) == list(range(300))
        late = box.expect("late")
        await redis_async.rpush(keys.reply(box.name), codec.dumps(["late", "ok", "x"]))
        await eventually(late.done)
        await box.close()


@pytest.mark.parametrize(
    "bad",
    [
        ["j", "error", "oops"],
        ["j", "error", None],
        [["j"], "ok", 1],
        ["j", "error", {"retry_after_s": "x"}],
        ["j", "error", {"code": "texts_too_long", "indices": 5}],
        ["j", "ok"],
        7,
    ],
)
async def test_a_reply_that_is_none_keeps_no_other_one_back(redis_url, redis_async, bad):
    async with connect_async(redis_url) as client:
        box = ReplyBox(client)
        await box.open()
        box.expect("j")
        good = box.expect("k")
        await redis_async.rpush(keys.reply(box.name), codec.dumps(bad))
        await redis_async.rpush(keys.reply(box.name), codec.dumps(["k", "ok", 1]))
        async with asyncio.timeout(20):
            assert await good == 1
        await box.close()


async def test_a_box_outlives_a_full_redis(redis_server_factory, each_redis_binary, monkeypatch):
    monkeypatch.setattr(keys, "ALIVE_TTL_S", 9)  # renewed each three seconds
    server = redis_server_factory(binary=each_redis_binary, append_only=False)
    async with connect_async(server.url) as client:
        box = ReplyBox(client)
        await box.open()
        await fill(client)
        left_ms: list[int] = []

        async def was_renewed_twice() -> bool:
            left_ms.append(await client.pttl(keys.alive(box.name)))
            assert left_ms[-1] > 0
            return sum(after > before for before, after in pairwise(left_ms)) >= 2

        await eventually_true(was_renewed_twice)
        await box.close()
        assert not await client.exists(keys.alive(box.name))


async def test_a_box_that_opens_on_a_full_redis_is_there_with_the_room(
    redis_server_factory, each_redis_binary, monkeypatch
):
    monkeypatch.setattr(keys, "ALIVE_TTL_S", 600)  # its next sign would be due in minutes
    server = redis_server_factory(binary=each_redis_binary, append_only=False)
    async with connect_async(server.url) as client:
        await fill(client)
        box = ReplyBox(client)
        await box.open()
        assert not await client.exists(keys.alive(box.name))
        await client.config_set("maxmemory", 0)

        async def is_alive() -> bool:
            return await client.exists(keys.alive(box.name))

        await eventually_true(is_alive)
        await box.close()


async def test_a_call_shows_a_box_that_redis_has_forgotten(redis_async):
    """Until the next sign of life every reply to it would be dropped."""
    await redis_async.delete(keys.alive("lost"))
    queue = keys.embed_queue("5pace", "interactive")
    await QueueClient(redis_async).enqueue(queue, [NewJob("j", b"x", 1)], Route(box="lost"))
    assert 0 < await redis_async.ttl(keys.alive("lost")) <= keys.ALIVE_TTL_S


async def fill(client) -> None:
    await client.config_set("maxmemory-policy", "noeviction")
    await client.config_set("maxmemory", 1)


async def eventually_true(condition) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.02)
