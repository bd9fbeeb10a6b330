"""Each script on a Redis that is full: what makes room goes on, what needs room is refused."""

from __future__ import annotations

import asyncio

import pytest
from servers import eventually, wait_until

from vecfleet.common import codec, keys
from vecfleet.common.errors import QueueFull
from vecfleet.common.queue_client import NewJob, Route
from vecfleet.common.redis_client import connect
from vecfleet.common.submission import Submissions
from vecfleet.worker.batch_worker import BatchWorker
from vecfleet.worker.handlers import One
from vecfleet.worker.heartbeat import Timing
from vecfleet.worker.job import Answer, Commit, HandOn, Settlement
from vecfleet.worker.ledger import Announcement, Ask, Ledger
from vecfleet.worker.window import Window

EVERYONE = keys.embed_queue("5pace", "bulk", keys.EVERY_TENANT)
MERGE = keys.merge_queue("c0ffee")
ACME = EVERYONE.of("acme")


def jobs(count: int, name: str = "j") -> list[NewJob]:
    data = codec.pack_call("vecfleet.embed", {"blob": b"x" * 1000})
    return [NewJob(f"{name}-{n}", data, 10, n, 1) for n in range(count)]


def fill(client) -> None:
    """From now on nothing that needs memory is accepted."""
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)


def ask(most: int) -> list[Ask]:
    return [Ask(EVERYONE, most, 1_000_000)]


def everything(client) -> dict[bytes, bytes]:
    return {key: client.dump(key) for key in client.keys("*")}


async def test_what_is_refused_leaves_nothing_behind(client, queues):
    submissions = Submissions(queues._redis)
    await submissions.open("old", tenant="-", collection="c", uid="c0ffee")
    before = everything(client)
    fill(client)
    routes = [
        Route(),
        Route(box="b", deadline_ms=1000),
        Route(submission="old", merge_queue=str(MERGE), version_uid="c0ffee"),
    ]
    for route in routes:
        for queue in (ACME, MERGE):
            with pytest.raises(QueueFull):
                await queues.enqueue(queue, jobs(3), route)
    with pytest.raises(QueueFull):
        await submissions.open("new", tenant="-", collection="c", uid="c0ffee")
    assert everything(client) == before


async def test_a_block_goes_all_its_way(client, queues):
    submissions = Submissions(queues._redis)
    await submissions.open("sub", tenant="acme", collection="c", uid="c0ffee")
    route = Route(submission="sub", merge_queue=str(MERGE), version_uid="c0ffee")
    await queues.enqueue(ACME, jobs(3), route)
    fill(client)
    mine = Ledger(client, "w")
    mine.roster.register([EVERYONE])
    claimed = mine.claim(ask(3))
    assert len(claimed) == 3
    assert mine.heartbeat(claimed, Announcement(pools=(EVERYONE.pool,))) == set()
    assert mine.release(claimed[2:]) == 1
    claimed = [*claimed[:2], *mine.claim(ask(3))]
    handed = [Settlement(job, HandOn(str(MERGE), b"s" * 5000, 1)) for job in claimed]
    assert mine.settle(handed) == [True] * 3
    shards = mine.claim([Ask(MERGE, 9, 1_000_000)])
    assert mine.settle([Settlement(job, Commit(1, {})) for job in shards]) == [True] * 3
    await submissions.close("sub", blocks=3, documents=3)
    assert (await submissions.get("sub")).state == "done"
    assert client.keys("rq:job:*") == client.keys("vf:load:*") == client.keys("vf:line:*") == []


async def test_the_dead_are_replaced_and_the_unwanted_cancelled(client, queues):
    await queues.enqueue(ACME, jobs(3))
    dying, other = Ledger(client, "dying", lease_s=0.01), Ledger(client, "other")
    assert len(dying.claim(ask(2))) == 2
    fill(client)
    again = 0

    def all_rescued() -> bool:
        nonlocal again
        again += other.rescue([EVERYONE])[0]
        return again == 2

    assert wait_until(all_rescued)
    (suspect,) = other.claim(ask(9))
    other.mark(suspect, 0, [EVERYONE])
    assert other.settle([Settlement(suspect, Answer({}))]) == [True]
    (running,) = other.claim(ask(9))
    left = ({f"j-{n}" for n in range(3)} - {suspect.id, running.id}).pop()
    assert await queues.cancel([running.id, left]) == 2
    assert other.heartbeat([running], Announcement()) == {running.execution}
    assert other.claim(ask(9)) == []
    with pytest.raises(QueueFull):  # RQ's picture can wait
        other.roster.sweep([EVERYONE])
    assert client.keys("rq:job:*") == client.keys("vf:sum:*") == client.keys("vf:line:*") == []


async def test_parked_blocks_come_back(client, queues):
    mine = Ledger(client, "w", max_merge_bytes=10)
    await queues.enqueue(ACME, jobs(1, "early"), Route(merge_queue=str(MERGE)))
    (job,) = mine.claim(ask(1))
    mine.settle([Settlement(job, HandOn(str(MERGE), b"s" * 100, 1))])
    await queues.enqueue(ACME, jobs(5), Route(merge_queue=str(MERGE)))
    fill(client)
    assert mine.claim(ask(9)) == []  # and parks them
    (shard,) = mine.claim([Ask(MERGE, 9, 1_000_000)])
    assert mine.settle([Settlement(shard, Commit(1, {}))]) == [True]
    assert len(mine.claim(ask(9))) == 5
    assert client.keys("vf:parked:*") == []


async def test_what_a_stock_queue_left_joins_its_line(client):
    client.rpush(keys.queue_list(EVERYONE.of("-")), "stock")
    client.hset(keys.job("stock"), "data", codec.pack_call("vecfleet.embed", {"texts": []}))
    client.sadd(keys.QUEUES, keys.queue_list(ACME))
    client.rpush(keys.queue_list(ACME), "other")
    client.hset(keys.job("other"), "data", codec.pack_call("vecfleet.embed", {"texts": []}))
    fill(client)
    mine = Ledger(client, "w")
    assert mine.rescue([EVERYONE]) == (0, 0)
    assert {job.id for job in mine.claim(ask(9))} == {"stock", "other"}


async def test_a_worker_that_lives_on_a_full_redis_still_rescues(client, queues, monkeypatch):
    """What it tells RQ's tools is refused every time; that must not keep it from its chores."""
    monkeypatch.setattr(keys, "LEASE_TTL_S", 600.0)  # for which a failed heartbeat does not rescue
    dying = Ledger(client, "dying", lease_s=0.3)
    await queues.enqueue(ACME, jobs(1))
    assert len(dying.claim(ask(1))) == 1
    fill(client)
    done: list[str] = []

    async def run(job):
        done.append(job.id)
        return Answer({})

    worker = BatchWorker(
        Ledger(connect(client.url), "alive"),
        queues=lambda: [EVERYONE],
        handlers={"vecfleet.embed": One(run)},
        windows={"bulk": Window(max_tokens=1000, max_jobs=8)},
        announce=lambda: Announcement(pools=(EVERYONE.pool,)),
        timing=Timing(heartbeat_s=0.05, rescue_s=0.6, drain_s=20),
    )
    stop = asyncio.Event()
    running = asyncio.create_task(worker.run(stop))
    try:
        await eventually(lambda: done == ["j-0"])
    finally:
        stop.set()
        await running
    assert client.keys("rq:job:*") == []
