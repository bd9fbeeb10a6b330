"""A reply box closes even where a cancellation of its reader is swallowed on the way."""

import asyncio

from servers import eventually

from vecfleet.common import codec, keys
from vecfleet.common.redis_client import connect_async
from vecfleet.common.reply_box import ReplyBox


async def test_a_swallowed_cancellation_does_not_keep_the_box_open(redis_url, redis_async):
    async with connect_async(redis_url) as client:
        reading = asyncio.Event()
        swallowed = []
        blpop = client.blpop

        async def swallowing(*arguments, **options):
            reading.set()
            try:
                return await blpop(*arguments, **options)
            except asyncio.CancelledError:
                if swallowed:
                    raise
                swallowed.append(1)  # once, as Python 3.11's wait_for may
                return None

        client.blpop = swallowing
        box = ReplyBox(client)
        await box.open()
        await reading.wait()
        async with asyncio.timeout(20):
            await box.close()
    assert swallowed
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
