"""Jobs written into Redis by hand, against real worker and aggregator processes."""

import asyncio
import itertools

import pytest
from fuzz.contract import Contract
from fuzz.fleet import live_fleet
from fuzz.raw_door import Hostile, push, wait_until_done
from fuzz.requests_run import Tally
from fuzz.sizes import sized
from fuzz.stories import Client, get_document, prepare, story
from hypothesis import given
from hypothesis import strategies as st

from vecfleet.common import codec, keys
from vecfleet.common.collection import Collection
from vecfleet.common.redis_client import connect

EXAMPLES, LONG = 24, 3  # make fuzz: so many times as many
MOST_JOBS = 20  # of one example
MOST_GROWTH_MB = 700.0  # a claim of many jobs that each inflate to what one may


@pytest.mark.timeout(600)
def test_hostile_jobs_come_to_an_end_and_their_neighbours_are_served(tmp_path, redis_binary):
    with live_fleet(tmp_path) as fleet, connect(fleet.redis.url) as client:
        tally = Tally()
        contract = Contract(asyncio.run(get_document(fleet.port)))
        asyncio.run(_prepared(fleet.port, contract, tally))
        record = client.hget(keys.collections(), "books")
        books = Collection.from_wire(codec.loads(record))
        space = books.spec.space
        queues = [
            *(str(keys.embed_queue(space, lane)) for lane in keys.LANES),
            str(keys.rerank_queue(space, "interactive")),
            str(keys.search_queue()),
            str(keys.catalog_queue()),
            str(books.merge_queue),
        ]
        before, numbers, jobs = fleet.rss_mb(), itertools.count(), itertools.count()

        @sized(EXAMPLES, LONG, shrinks=False)
        @given(st.randoms(use_true_random=False), st.integers(1, MOST_JOBS))
        def check(generator, count):
            hostile = Hostile(generator, queues, books.uid, space, jobs)
            for _ in range(count):
                push(client, hostile.job())
            if (number := next(numbers)) % 3 == 0:
                asyncio.run(story(Client(fleet.port, contract, tally), f"story-{number}", tally))
            wait_until_done(client, queues)
            fleet.check_alive()
            assert not tally.failures, tally.failures[:3]
            for role, now in fleet.rss_mb().items():
                assert now - before[role] < MOST_GROWTH_MB, (role, before[role], now)

        check()
        assert next(jobs) > 5 * EXAMPLES


async def _prepared(port, contract, tally):
    client = Client(port, contract, tally)
    await prepare(client)
    client.close()
