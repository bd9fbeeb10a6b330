"""Many requests that ask for a model read the directory once; stale answers are refreshed."""

import asyncio
from dataclasses import replace

import pytest
from gateway_responder import CARD, Responder
from servers import eventually

from vecfleet.common import keys
from vecfleet.common.collection import Collection, CollectionSpec
from vecfleet.common.directory import Directory
from vecfleet.common.errors import RedisUnavailable, SpaceMismatch, UnknownModel
from vecfleet.common.redis_client import connect_async


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


async def mget_calls(client):
    return (await client.info("commandstats")).get("cmdstat_mget", {}).get("calls", 0)


async def test_callers_share_one_reading(redis_async):
    await Responder(redis_async).announce()
    clock = Clock()
    directory = Directory(redis_async, clock)
    found = await asyncio.gather(*(directory.find(CARD.name, "embed") for _ in range(50)))
    assert {served.card.name for served in found} == {CARD.name}
    assert await mget_calls(redis_async) == 1
    await directory.find(CARD.name, "embed")
    assert await mget_calls(redis_async) == 1
    clock.now += 2  # no longer fresh, still usable: answered at once, read again beside it
    await asyncio.gather(*(directory.find(CARD.name, "embed") for _ in range(50)))

    async def read_again():
        return await mget_calls(redis_async) == 2

    await eventually(read_again)


async def test_a_model_that_has_just_come_up_is_found(redis_async):
    directory = Directory(redis_async, Clock())
    with pytest.raises(UnknownModel):
        await directory.find(CARD.name, "embed")
    await Responder(redis_async).announce()
    assert (await directory.find(CARD.name, "embed")).workers == ("responder",)


async def test_queries_go_to_a_served_model_of_the_collections_space(redis_async):
    spec = CollectionSpec(CARD.name, CARD.space, CARD.dimension)
    collection = Collection("books", "c0ffee" * 5 + "00", spec)
    clock = Clock()
    directory = Directory(redis_async, clock)
    renamed = replace(CARD, name="test/renamed")
    await Responder(redis_async, renamed).announce()
    assert (await directory.embedder(collection)).name == "test/renamed"
    await Responder(redis_async).announce()
    clock.now += 60
    assert (await directory.embedder(collection)).name == CARD.name
    for name in (CARD.name, "test/renamed"):
        await redis_async.delete(keys.model(name))
    await Responder(redis_async, replace(CARD, space="f" * 16)).announce()
    clock.now += 60
    with pytest.raises(SpaceMismatch):
        await directory.embedder(collection)


async def test_a_caller_that_gives_up_leaves_the_reading_to_the_others(redis_async):
    await Responder(redis_async).announce()
    directory = Directory(redis_async, Clock())
    tasks = [asyncio.create_task(directory.find(CARD.name, "embed")) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    told = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(told[0], asyncio.CancelledError)
    assert told[1].card.name == told[2].card.name == CARD.name


async def test_redis_away_is_told_once_the_answer_is_too_old(redis_server_factory):
    server = redis_server_factory()
    async with connect_async(server.url) as client:
        await Responder(client).announce()
        clock = Clock()
        directory = Directory(client, clock)
        await directory.find(CARD.name, "embed")
        server.stop()
        clock.now += 2
        assert (await directory.find(CARD.name, "embed")).card.name == CARD.name
        clock.now += 10
        with pytest.raises(RedisUnavailable):
            await directory.find(CARD.name, "embed")
