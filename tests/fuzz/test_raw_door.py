"""Jobs written into Redis by hand, against real worker and aggregator processes."""

import asyncio
import itertools
import random
from collections import Counter

import pytest
from fuzz.contract import Contract
from fuzz.fleet import live_fleet
from fuzz.raw_door import ODD, Hostile, push, wait_until_done
from fuzz.requests_run import Tally
from fuzz.sizes import sized
from fuzz.stories import DOCUMENTS, Client, get_document, prepare, story
from hypothesis import given
from hypothesis import strategies as st

from vecfleet.common import codec, keys
from vecfleet.common.collection import Collection
from vecfleet.common.limits import MAX_TOP_K
from vecfleet.common.redis_client import connect

EXAMPLES, LONG = 24, 3  # make fuzz: so many times as many
MOST_JOBS = 20  # of one example
MOST_GROWTH_MB = 500.0  # of one role, which has processes that each decompress 32 MiB and unpack it


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
        found = Counter()

        @sized(EXAMPLES, LONG, shrinks=False)
        @given(st.integers(0, 2**64 - 1), st.integers(1, MOST_JOBS))
        def check(seed, count):
            hostile = Hostile(random.Random(seed), queues, books, jobs)
            made = [hostile.job() for _ in range(count)]
            for job in made:
                push(client, job)
            if (number := next(numbers)) % 3 == 0:
                asyncio.run(story(Client(fleet.port, contract, tally), f"story-{number}", tally))
            wait_until_done(client, queues)
            asyncio.run(_read(fleet.port, contract, tally, made, found))
            fleet.check_alive()
            assert not tally.failures, tally.failures[:3]
            for role, now in fleet.rss_mb().items():
                assert now - before[role] < MOST_GROWTH_MB, (role, before[role], now)

        check()
        assert next(jobs) > 5 * EXAMPLES
        assert found[200] > EXAMPLES // 4, f"hardly any of them came into the index: {found}"


async def _read(port, contract, tally, made, found):
    """Whatever has come into the index can be read, and does not stop a search."""
    client = Client(port, contract, tally)
    odd = [job.id.decode() for job in made if job.id.startswith(ODD.encode())]
    for document in [name for one in odd for name in (one, f"{one}-a")]:
        answer = await client.send("GET", f"/collections/books/documents/{document}")
        assert answer.status in (200, 404), (document, answer)
        found[answer.status] += 1
    if odd:
        everything = {"query": "the odd text of 1", "top_k": MAX_TOP_K}
        hits = await client.ask("POST", "/collections/books/search", everything)
        assert len(hits["results"]) >= DOCUMENTS
    client.close()


async def _prepared(port, contract, tally):
    client = Client(port, contract, tally)
    await prepare(client)
    client.close()
