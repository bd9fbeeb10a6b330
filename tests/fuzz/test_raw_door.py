"""Jobs written into Redis by hand, against real worker and aggregator processes."""

import asyncio
import random

import pytest
from fuzz.fleet import live_fleet
from fuzz.raw_door import Hostile, push, wait_until_done
from fuzz.requests_run import Tally, prepare, story

from vecfleet.common import codec, keys
from vecfleet.common.collection import Collection
from vecfleet.common.redis_client import connect

ROUNDS, JOBS = 6, 40
MOST_GROWTH_MB = 700.0  # a claim of many jobs that each inflate to what one may


@pytest.mark.timeout(300)
def test_hostile_jobs_come_to_an_end_and_their_neighbours_are_served(tmp_path, redis_binary):
    with live_fleet(tmp_path) as fleet, connect(fleet.redis.url) as client:
        asyncio.run(prepare(fleet.port))
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
        hostile = Hostile(random.Random(3), queues, books.uid, space)
        before, tally = fleet.rss_mb(), Tally()
        for number in range(ROUNDS):
            for _ in range(JOBS):
                push(client, hostile.job())
            asyncio.run(story(fleet.port, f"story-{number}", tally))
            wait_until_done(client, queues)
            fleet.check_alive()
        assert not tally.failures, tally.failures
        for role, now in fleet.rss_mb().items():
            assert now - before[role] < MOST_GROWTH_MB, (role, before[role], now)
