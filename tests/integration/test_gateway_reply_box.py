"""A reply box gives each reply to whoever waits, and closes at any moment."""

import asyncio

from servers import eventually

from vecfleet.common import codec, keys
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
