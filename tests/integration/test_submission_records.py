"""How long Redis remembers a submission, how many of a tenant, and what a full Redis refuses."""

from __future__ import annotations

import pytest

from vecfleet.common import codec, keys
from vecfleet.common.admission import Admission
from vecfleet.common.collection import Collection, CollectionSpec
from vecfleet.common.document import Block, Document
from vecfleet.common.errors import QueueFull, UnknownSubmission
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.queue_client import NewJob, QueueClient, Route
from vecfleet.common.redis_client import connect_async
from vecfleet.common.submission import Submissions
from vecfleet.gateway.config import GatewayLimits
from vecfleet.gateway.feeder import Feeder
from vecfleet.worker.job import Commit, Failure, HandOn, Settlement
from vecfleet.worker.ledger import Ask, Ledger

QUEUE = keys.embed_queue("5pace", "bulk", "acme")
MERGE = keys.merge_queue("c0ffee", "acme")
DATA = codec.pack_call("vecfleet.embed", {"texts": ["a"]})
ALL = "vf:subs:acme"
WEEK_S, DAY_S, HOUR_S = 7 * 86400, 86400, 3600
MANY, VERY_MANY = 20_001, 100_001


@pytest.fixture
def book(asynchronous):
    return Submissions(asynchronous, Admission(max_submissions=3))


async def open_one(book, name, **more):
    return await book.open(name, tenant="acme", collection="c", uid="c0ffee", **more)


async def enqueue(book, name, **limits):
    client = QueueClient(book._redis, Admission(**limits))
    route = Route(submission=name, merge_queue=str(MERGE))
    await client.enqueue(QUEUE, [NewJob(f"{name}-0", DATA, 5, 0, 1)], route)


def settle(client, outcome):
    ledger = Ledger(client, "w")
    (job,) = ledger.claim([Ask(QUEUE, 1, 99)])
    ledger.settle([Settlement(job, outcome)])
    if isinstance(outcome, HandOn):
        (shard,) = ledger.claim([Ask(MERGE, 1, 99)])
        ledger.settle([Settlement(shard, Commit(1, {}))])


def lives(client, name) -> int:
    """Seconds until it is forgotten, as its hash and its tenant's list say together."""
    pipe = client.pipeline(transaction=True)
    pipe.ttl(keys.submission(name))
    pipe.zscore(ALL, name)
    pipe.time()
    ttl, until, (now, _) = pipe.execute()
    assert abs(until - now - ttl) <= 2
    return ttl


async def test_one_into_which_nothing_went_is_forgotten_soon(client, book):
    await open_one(book, "s")
    assert HOUR_S - 60 < lives(client, "s") <= HOUR_S
    with pytest.raises(QueueFull):
        await enqueue(book, "s", max_merge_bytes=-1)
    await book.discard("s", 120)
    assert 60 < lives(client, "s") <= 120
    await open_one(book, "s")  # the same key again
    assert lives(client, "s") > HOUR_S - 60
    await enqueue(book, "s")
    assert WEEK_S - 60 < lives(client, "s") <= WEEK_S


@pytest.mark.parametrize("ttl", ["x", "", "-5", "1e99", "7.5", None])
async def test_a_record_that_others_have_written_stops_no_enqueue(client, book, ttl):
    await open_one(book, "s")
    if ttl is None:
        client.hdel(keys.submission("s"), "ttl_s")
    else:
        client.hset(keys.submission("s"), "ttl_s", ttl)
    await enqueue(book, "s")
    assert len(Ledger(client, "w").claim([Ask(QUEUE, 1, 99)])) == 1


async def test_what_has_begun_is_not_discarded(client, book):
    """Two calls with one key: what is admitted of the one stays when the other is refused."""
    await open_one(book, "s")
    await open_one(book, "s")
    await enqueue(book, "s")
    for spare_s in (0, 120):
        await book.discard("s", spare_s)
        assert lives(client, "s") > WEEK_S - 60
    await open_one(book, "empty")
    await book.discard("empty")
    assert not client.exists(keys.submission("empty"))
    assert client.zrange(ALL, 0, -1) == [b"s"]


@pytest.mark.parametrize("outcome", [HandOn(str(MERGE), DATA, 1), Failure(QueueFull("no"))])
@pytest.mark.parametrize(
    ("once", "others", "most_s"),
    [
        (False, 0, WEEK_S),
        (False, MANY, DAY_S),
        (False, VERY_MANY, 3600),
        (True, 0, DAY_S),
        (True, MANY, 300),
    ],
)
async def test_how_long_one_is_kept_after_its_end_goes_by_its_name_and_its_tenants_others(
    client, book, once, others, most_s, outcome
):
    await open_one(book, "s", once=once)
    await enqueue(book, "s")
    await book.close("s", blocks=1, documents=1)
    assert WEEK_S - 60 < lives(client, "s") <= WEEK_S
    if others:
        client.zadd(ALL, {f"other-{n}": 1 << 40 for n in range(others)})
    settle(client, outcome)
    assert (await book.get("s")).state == "done"
    assert most_s - 60 < lives(client, "s") <= most_s
    parts = [keys.submission("s") + part for part in (":ok", ":bad", ":errors")]
    assert all(client.ttl(part) <= most_s for part in parts)


async def test_one_that_is_closed_last_is_forgotten_soon_too(client, book):
    await open_one(book, "s", once=True)
    await enqueue(book, "s")
    settle(client, HandOn(str(MERGE), DATA, 1))
    assert await book.close("s", blocks=1, documents=1) == "done"
    assert DAY_S - 60 < lives(client, "s") <= DAY_S


async def test_a_tenant_has_so_many_and_no_more(client, book):
    for n in range(3):
        await open_one(book, f"s{n}")
    with pytest.raises(QueueFull, match="submissions"):
        await open_one(book, "s3")
    assert not client.exists(keys.submission("s3"))
    assert await open_one(book, "s1") == "open"
    await book.open("theirs", tenant="other", collection="c", uid="c0ffee")
    client.zadd(ALL, {"s0": 1})  # its time is over
    assert await open_one(book, "s3") == "open"
    assert client.zrange(ALL, 0, -1) == [b"s1", b"s2", b"s3"]


async def test_a_full_redis_lets_one_be_cancelled_and_opened_again(client, book):
    await open_one(book, "s")
    await enqueue(book, "s")
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)
    assert await open_one(book, "s") == "open"
    with pytest.raises(QueueFull):
        await open_one(book, "new")
    assert (await book.cancel("s")).state == "cancelled"
    assert Ledger(client, "w").claim([Ask(QUEUE, 1, 99)]) == []


async def test_a_refused_call_with_a_key_leaves_little(client):
    collection = Collection("c", "c0ffee", CollectionSpec("m", "5pace", 8), tenant="acme")
    block = Block()
    block.add(Document("a", "some words"))
    async with connect_async(client.url) as connection:
        fleet = FleetClient(connection, admission=Admission(max_tokens=6))
        await fleet.queues.enqueue(QUEUE, [NewJob("first", DATA, 5)])
        for keyed in (True, False):
            feeder = Feeder(fleet, collection, f"s{keyed}", True, GatewayLimits(), keyed=keyed)
            with pytest.raises(QueueFull):
                await feeder.send([block], 0)
            await feeder.settle_partial()
    assert 60 < lives(client, "sTrue") <= 120
    assert not client.exists(keys.submission("sFalse"))
    assert client.zrange(ALL, 0, -1) == [b"sTrue"]


async def test_what_is_over_is_not_cancelled(client, book):
    with pytest.raises(UnknownSubmission):
        await book.cancel("nobody")
    assert not client.exists(keys.submission("nobody"))
    await open_one(book, "s")
    await book.close("s", blocks=0, documents=0)
    assert (await book.cancel("s")).state == "done"
