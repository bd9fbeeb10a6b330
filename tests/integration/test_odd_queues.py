"""Queues that were forgotten, emptied by others, or hold what is no job; on each Redis there is."""

from __future__ import annotations

import logging

import pytest
from rq import Queue
from rq.registry import FailedJobRegistry
from servers import wait_until

from vecfleet.common import codec, keys
from vecfleet.common.codec import Serializer
from vecfleet.common.errors import InvalidInput, VecfleetError
from vecfleet.common.queue_client import NewJob, Route
from vecfleet.worker.job import Answer, Commit, Failure, HandOn, Settlement
from vecfleet.worker.ledger import Ask, Ledger

EVERYONE = keys.embed_queue("5pace", "bulk", keys.EVERY_TENANT)
MERGE = keys.merge_queue("c0ffee" * 5 + "00", "acme")


def of(tenant: str) -> keys.QueueName:
    return EVERYONE.of(tenant)


def jobs(name: str, count: int, tokens: int = 10) -> list[NewJob]:
    data = codec.pack_call("vecfleet.embed", {})
    return [NewJob(f"{name}-{n}", data, tokens, n, 1) for n in range(count)]


def ask(most: int) -> list[Ask]:
    return [Ask(EVERYONE, most, 1_000_000)]


# Parked and forgotten


async def test_a_parked_job_is_rescued_although_its_queue_was_forgotten(client, queues):
    await queues.enqueue(of("acme"), jobs("j", 2), Route(merge_queue=str(MERGE)))
    dying = Ledger(client, "dying", lease_s=0.05, max_merge_bytes=100)
    other = Ledger(client, "other", max_merge_bytes=100)
    (first,) = dying.claim(ask(1))
    assert dying.settle([Settlement(first, HandOn(str(MERGE), b"s" * 500, 1))]) == [True]
    assert dying.claim(ask(9)) == []
    assert client.lrange(f"vf:parked:{MERGE}", 0, -1) == [b"j-1"]
    other.rescue([EVERYONE])
    other.roster.sweep([EVERYONE])
    name = keys.queue_list(of("acme"))
    assert not client.sismember(keys.QUEUES, name)
    (shard,) = other.claim([Ask(MERGE, 9, 1_000_000)])
    assert other.settle([Settlement(shard, Commit(1, {}))]) == [True]
    assert other.claim([Ask(MERGE, 9, 1_000_000)]) == []
    assert client.sismember(keys.QUEUES, name), "people see it wait"
    (second,) = dying.claim(ask(9))
    assert second.id == "j-1"
    assert wait_until(lambda: other.rescue([EVERYONE]) == (1, 0))


async def test_what_was_pushed_by_hand_is_rescued_too(client, queues):
    await queues.enqueue(of("acme"), jobs("j", 1))
    client.srem(keys.QUEUES, keys.queue_list(of("acme")))
    dying, other = Ledger(client, "dying", lease_s=0.01), Ledger(client, "other")
    assert len(dying.claim(ask(9))) == 1
    assert wait_until(lambda: other.rescue([EVERYONE]) == (1, 0))


# In a line where they do not belong


@pytest.mark.parametrize(
    "odd",
    [
        b"vf.\xff.embed.5pace.bulk",
        b"vf.a b.embed.5pace.bulk",
        b"vf.*.embed.5pace.bulk",
        b"vf.acme.embed.other.bulk",
        b"vf.%s.embed.5pace.bulk" % (b"a" * 300),
        b"embed.5pace.bulk",
    ],
)
async def test_a_queue_of_another_name_leaves_the_line_and_holds_nobody_up(client, queues, odd):
    data = codec.pack_call("vecfleet.embed", {})
    for n in range(40):  # more of them than one claim looks at
        client.zadd(keys.line(EVERYONE), {odd.replace(b"vf.", b"vf.%d" % n): 0})
    client.zadd(keys.line(EVERYONE), {odd: 0})
    client.hset("rq:job:odd", mapping={"data": data, "status": "queued", "vf_cost": 1})
    client.rpush(b"rq:queue:" + odd, "odd")
    client.sadd(keys.QUEUES, b"rq:queue:" + odd)
    await queues.enqueue(of("acme"), jobs("good", 2))
    mine, claimed = Ledger(client, "w"), []
    while client.lpop(keys.bell(EVERYONE)):
        claimed += mine.claim(ask(9))
    assert {"good-0", "good-1"} == {job.id for job in claimed} - {"odd"}
    assert not client.exists(keys.line(EVERYONE))
    assert mine.rescue([EVERYONE]) == (0, 0)


@pytest.mark.parametrize("tenant", ["\xff", "a b", "*", "", "a.b.c d"])
async def test_nobody_enqueues_into_a_queue_of_another_name(client, queues, tenant):
    with pytest.raises(InvalidInput, match="is no name of a queue"):
        await queues.enqueue(EVERYONE.of(tenant), jobs("j", 1))
    assert client.keys("*") == []


# Of another type


async def test_what_is_no_list_leaves_the_line_and_holds_nobody_up(client, queues):
    for n in range(40):  # more of them than one claim looks at
        client.sadd(keys.queue_list(of(f"evil{n}")), "x")
        client.sadd(keys.QUEUES, keys.queue_list(of(f"evil{n}")))
        client.zadd(keys.line(EVERYONE), {str(of(f"evil{n}")): 0})
    await queues.enqueue(of("acme"), jobs("good", 2))
    mine, claimed = Ledger(client, "w"), []
    while client.lpop(keys.bell(EVERYONE)):
        claimed += mine.claim(ask(9))
    assert [job.id for job in claimed] == ["good-0", "good-1"]
    assert mine.rescue([EVERYONE]) == (0, 0)
    assert not client.exists(keys.line(EVERYONE))


@pytest.mark.parametrize("name", ["vf:lease:{}", "rq:workers:{}"])
async def test_keys_of_another_type_stop_no_chore(client, queues, name):
    await queues.enqueue(of("acme"), jobs("j", 1))
    assert Ledger(client, "dead", lease_s=0.05).claim(ask(1))
    evil = of("evil")
    client.set(name.format(evil), "x")
    client.sadd(keys.QUEUES, keys.queue_list(evil))
    client.zadd(keys.busy(EVERYONE), {str(evil): 0})
    mine = Ledger(client, "w")
    assert wait_until(lambda: mine.rescue([EVERYONE]) == (1, 0))
    mine.roster.sweep([EVERYONE])
    assert not client.zscore(keys.busy(EVERYONE), str(evil))


# Brought back by stock tools, which count nothing


@pytest.mark.parametrize("counted", [0, 3])
async def test_what_rq_brings_back_leaves_nothing_in_the_sums(client, queues, counted):
    """Nor does it take out of them what others have there."""
    mine = Ledger(client, "w")
    await queues.enqueue(of("acme"), jobs("j", 20))
    failed = [Settlement(job, Failure(InvalidInput("no"))) for job in mine.claim(ask(20))]
    assert mine.settle(failed) == [True] * 20
    await queues.enqueue(of("other"), jobs("o", 1))
    if counted:
        await queues.enqueue(of("acme"), jobs("k", counted))
    registry = FailedJobRegistry(str(of("acme")), connection=client, serializer=Serializer)
    for n in range(20):
        registry.requeue(f"j-{n}")
    assert await queues.cancel(["j-19"]) == 1
    held = loads(client)
    assert held["vf:sum:embed.5pace.bulk"] == sums(client)
    done = 0
    while found := mine.claim([Ask(of("acme"), 2, 1_000_000)]):
        assert loads(client)["vf:sum:embed.5pace.bulk"] == sums(client)
        done += sum(mine.settle([Settlement(job, Answer({})) for job in found]))
    assert done == 19 + counted
    left = loads(client)
    assert left == {name: left[str(keys.load(of("other")))] for name in left}
    assert left["vf:sum:embed.5pace.bulk"]["jobs"] == 1


async def test_what_is_cancelled_takes_no_more_than_was_counted(client, queues):
    """Else a load of no jobs keeps bytes, and the sum goes below nothing: as good as no limit."""
    mine = Ledger(client, "w")
    await queues.enqueue(of("a"), [NewJob("u", codec.pack_call("vecfleet.embed", {}), 1)])
    (job,) = mine.claim(ask(1))
    mine.settle([Settlement(job, Failure(InvalidInput("no")))])
    await queues.enqueue(of("a"), [NewJob("big", bytes(50_000), 900)])
    FailedJobRegistry(str(of("a")), connection=client, serializer=Serializer).requeue("u")
    own = {"data": b"x", "status": "queued", "origin": str(of("a"))}
    client.hset(keys.job("stock"), mapping=own)
    assert await queues.cancel(["stock"]) == 1
    assert loads(client)[keys.load(of("a"))] == {"tokens": 900, "bytes": 51_500, "jobs": 1}
    client.hset(keys.job("odd"), mapping={**own, "vf_cost": "-1.5"})
    assert await queues.cancel(["odd", "u"]) == 2
    for n in range(4):
        await queues.enqueue(of("b"), jobs(f"b{n}", 1))
        assert loads(client)["vf:sum:embed.5pace.bulk"] == sums(client)
        mine.claim(ask(1))
        told = loads(client)
        assert told.get("vf:sum:embed.5pace.bulk", dict.fromkeys(FIELDS, 0)) == sums(client)


FIELDS = ("tokens", "bytes", "jobs")


def loads(client) -> dict[str, dict[str, int]]:
    """What is told of all that waits."""
    names = sorted([*client.keys("vf:load:*"), *client.keys("vf:sum:*")])
    return {
        name.decode(): {field.decode(): int(n) for field, n in client.hgetall(name).items()}
        for name in names
    }


def sums(client) -> dict[str, int]:
    """What the tenants' loads come to."""
    each = [load for name, load in loads(client).items() if name.startswith("vf:load:")]
    assert all(n >= 0 for load in each for n in load.values())
    return {field: sum(load.get(field, 0) for load in each) for field in FIELDS}


async def test_a_claim_that_fails_leaves_word_of_its_leases(client, queues):
    """Rescue and those whose reply was lost find them by it."""
    await queues.enqueue(of("a"), jobs("a", 1))
    await queues.enqueue(of("b"), jobs("b", 1))
    client.set(keys.load(of("a")), "no hash")
    mine = Ledger(client, "w", lease_s=0.05)
    with pytest.raises(VecfleetError):
        mine.claim(ask(9))
    taken = [queue for queue in (of("a"), of("b")) if client.exists(keys.lease(queue))]
    assert taken
    assert {str(queue).encode() for queue in taken} <= set(
        client.zrange(keys.busy(EVERYONE), 0, -1)
    )


async def test_a_job_of_no_origin_that_was_parked_comes_back(client, queues):
    await queues.enqueue(of("acme"), jobs("j", 2), Route(merge_queue=str(MERGE)))
    client.hdel(keys.job("j-1"), "origin")
    mine = Ledger(client, "w", max_merge_bytes=100)
    (first,) = mine.claim(ask(1))
    mine.settle([Settlement(first, HandOn(str(MERGE), b"s" * 500, 1))])
    assert mine.claim(ask(9)) == []
    (shard,) = mine.claim([Ask(MERGE, 9, 1_000_000)])
    assert mine.settle([Settlement(shard, Commit(1, {}))]) == [True]
    assert mine.claim([Ask(MERGE, 9, 1_000_000)]) == []
    assert [job.id for job in mine.claim(ask(9))] == ["j-1"]


# Emptied by stock tools


async def test_emptied_queues_keep_nobody_out(client, queues):
    """More of them than one claim looks at, all of them ahead of the one with a job."""
    for n in range(70):
        await queues.enqueue(of(f"t{n:02d}"), jobs(f"t{n}", 1))
    for n in range(69):
        Queue(str(of(f"t{n:02d}")), connection=client).empty()
    mine = Ledger(client, "w")
    bell = keys.bell(EVERYONE)
    claimed = []
    for _ in range(3):
        assert client.lpop(bell), "it is called again at once"
        claimed += mine.claim(ask(9))
    assert [job.id for job in claimed] == ["t69-0"]
    assert mine.settle([Settlement(job, Answer({})) for job in claimed]) == [True]
    assert client.keys("vf:line:*") == client.keys("vf:load:*") == client.keys("vf:sum:*") == []


async def test_an_emptied_merge_queue_is_not_full(client, queues):
    mine = Ledger(client, "w", max_merge_bytes=100)
    await queues.enqueue(of("acme"), jobs("j", 2), Route(merge_queue=str(MERGE)))
    (first,) = mine.claim(ask(1))
    mine.settle([Settlement(first, HandOn(str(MERGE), b"s" * 500, 1))])
    assert mine.claim(ask(9)) == []  # parked
    Queue(str(MERGE), connection=client).empty()
    assert mine.claim([Ask(MERGE, 9, 1_000_000)]) == []
    assert [job.id for job in mine.claim(ask(9))] == ["j-1"]
    assert client.keys("vf:sum:*") == []


# No jobs


async def test_what_is_no_job_is_told(client, queues, caplog):
    client.set("rq:job:a-string", "secret")
    client.hset("rq:job:no-data", "status", "queued")
    client.rpush(keys.queue_list(of("acme")), "a-string", "no data: at all", "x" * 300, "no-data")
    await queues.enqueue(of("acme"), jobs("cancelled", 1))
    await queues.enqueue(of("acme"), jobs("good", 1))
    await queues.cancel(["cancelled-0"])
    mine = Ledger(client, "w")
    with caplog.at_level(logging.WARNING):
        assert [job.id for job in mine.claim(ask(9))] == ["good-0"]
        assert mine.claim(ask(9)) == []
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == f"dropped 4 entries of queue {str(of('acme'))!r} that are no jobs"


async def test_what_all_merge_queues_keep_out_is_not_brought_back_before_there_is_room(
    client, queues
):
    """Both sides know both bounds: else jobs would go to and fro at each claim."""
    theirs = keys.merge_queue("d0" * 16, "acme")
    shard = codec.pack_call("vecfleet.merge", {"delete": ["a" * 8500]})
    await queues.enqueue(theirs, [NewJob(f"b{n}", shard, 1) for n in range(9)])
    await queues.enqueue(MERGE, [NewJob(f"a{n}", shard, 1) for n in range(2)])
    await queues.enqueue(of("acme"), jobs("e", 8), Route(merge_queue=str(MERGE)))
    bounds = {"max_merge_bytes": 50_000, "max_unmerged_bytes": 120_000}
    worker, writer = Ledger(client, "w", **bounds), Ledger(client, "aggregator", **bounds)
    assert worker.claim(ask(9)) == []
    assert client.llen(f"vf:parked:{MERGE}") == 8
    for _ in range(3):
        assert writer.claim([Ask(MERGE, 0, 1)]) == []
        assert client.llen(f"vf:parked:{MERGE}") == 8
    merged = writer.claim([Ask(theirs, 9, 99)])
    assert writer.settle([Settlement(job, Commit(1, {})) for job in merged]) == [True] * 9
    writer.claim([Ask(MERGE, 0, 1)])
    assert not client.exists(f"vf:parked:{MERGE}")
    assert len(worker.claim(ask(9))) == 8


async def test_a_claim_that_fails_loses_no_job(client, queues):
    await queues.enqueue(of("a"), jobs("a", 1))
    client.set(keys.busy(EVERYONE), "no zset")
    mine, other = Ledger(client, "w", lease_s=0.05), Ledger(client, "other")
    with pytest.raises(VecfleetError):
        mine.claim(ask(9))
    client.delete(keys.busy(EVERYONE))
    assert wait_until(lambda: other.rescue([EVERYONE]) == (1, 0))
