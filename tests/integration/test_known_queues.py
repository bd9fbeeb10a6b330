"""However many queues there are: the dead's jobs are rescued, and empty queues are forgotten."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from servers import wait_until

from vecfleet.common import codec, keys
from vecfleet.common.queue_client import NewJob, Route
from vecfleet.worker import known_queues
from vecfleet.worker.job import Abandoned, Answer, Commit, HandOn, Settlement
from vecfleet.worker.ledger import KNOWN_AT_ONCE, Announcement, Ask, Ledger

EVERYONE = keys.embed_queue("5pace", "bulk", keys.EVERY_TENANT)
OLD = keys.embed_queue("0ld", "bulk", keys.EVERY_TENANT)
BUSY = keys.busy(EVERYONE)
MANY = 12_000


def of(tenant: str) -> keys.QueueName:
    return EVERYONE.of(tenant)


def job(name: str) -> NewJob:
    return NewJob(f"j-{name}", codec.pack_call("vecfleet.embed", {}), 1)


def ask(most: int) -> list[Ask]:
    return [Ask(EVERYONE, most, 1_000_000)]


def know(client, queues: Iterable[keys.QueueName], *, dead: bool = False) -> None:
    """RQ knows the queues; something is in them where there is something in their dead letter."""
    pipe = client.pipeline()
    for queue in queues:
        pipe.sadd(keys.QUEUES, keys.queue_list(queue))
        if dead:
            pipe.zadd(keys.dead(queue), {"x": 9e9})
    pipe.execute()


def known(client) -> set[str]:
    return {name.decode().removeprefix("rq:queue:") for name in client.smembers(keys.QUEUES)}


async def died_with_a_job_of_each(client, queues, tenants: list[str]) -> None:
    for tenant in tenants:
        await queues.enqueue(of(tenant), [job(tenant)])
    dying = Ledger(client, "dying", lease_s=0.05)
    taken = 0
    while jobs := dying.claim(ask(500)):
        taken += len(jobs)
    assert taken == len(tenants)


async def test_leases_are_found_at_once_among_any_number_of_queues(client, queues):
    know(client, (of(f"t{n:05d}") for n in range(MANY)), dead=True)
    tenants = [f"t{n:05d}" for n in range(0, MANY, 60)]
    await died_with_a_job_of_each(client, queues, tenants)
    other = Ledger(client, "other")
    client.config_resetstat()
    assert wait_until(lambda: client.zcount(BUSY, "-inf", _now_ms(client)) == len(tenants))
    assert other.rescue([EVERYONE]) == (len(tenants), 0), "in one look"
    looked_at = client.info("commandstats")["cmdstat_zrangebyscore"]["calls"]
    assert looked_at < MANY / 4, "not at all that RQ knows"
    assert not client.exists(BUSY)
    assert not any(client.exists(keys.lease(of(tenant))) for tenant in tenants)


def _now_ms(client) -> float:
    seconds, microseconds = client.time()
    return seconds * 1000 + microseconds / 1000


async def test_leases_that_nothing_tells_of_are_found_in_their_turn(client, queues):
    """As those of workers of an older version: every queue that RQ knows comes by."""
    know(client, (of(f"t{n:05d}") for n in range(MANY)), dead=True)
    tenants = [f"t{n:05d}" for n in range(0, MANY, 60)]
    await died_with_a_job_of_each(client, queues, tenants)
    client.delete(BUSY)
    other = Ledger(client, "other")
    rescued = looks = 0
    while rescued < len(tenants):
        rescued += other.rescue([EVERYONE])[0]
        looks += 1
        assert looks <= 3 * MANY / KNOWN_AT_ONCE
    assert looks > MANY / KNOWN_AT_ONCE / 3


async def test_one_look_takes_over_no_more_than_it_may(client, queues, monkeypatch):
    monkeypatch.setattr("vecfleet.worker.ledger._RESCUE_AT_ONCE", 3)
    await died_with_a_job_of_each(client, queues, [f"t{n}" for n in range(7)])
    other = Ledger(client, "other")
    assert wait_until(lambda: client.zcount(BUSY, "-inf", _now_ms(client)) == 7)
    assert [other.rescue([EVERYONE])[0] for _ in range(4)] == [3, 3, 1, 0]


async def test_a_queue_is_looked_at_when_its_first_lease_may_be_over(client, queues):
    mine, other = Ledger(client, "w"), Ledger(client, "other")
    await queues.enqueue(of("acme"), [job("a"), job("b")])
    first, second = mine.claim(ask(1)) + mine.claim(ask(1))
    due = client.zscore(BUSY, str(of("acme")))
    assert due == client.zscore(keys.lease(of("acme")), f"{first.id}:{first.execution}")
    client.zadd(BUSY, {str(of("acme")): 1})
    assert wait_until(lambda: _now_ms(client) > due - keys.LEASE_TTL_S * 1000 + 2)
    mine.heartbeat([first, second], Announcement())
    assert other.rescue([EVERYONE]) == (0, 0)
    renewed = client.zscore(keys.lease(of("acme")), f"{first.id}:{first.execution}")
    assert client.zscore(BUSY, str(of("acme"))) == renewed > due
    # A job whose engine died is over now, whatever the lease said.
    assert mine.settle([Settlement(second, Abandoned())]) == [True]
    client.delete(keys.QUEUES)
    assert other.rescue([EVERYONE]) == (1, 0)
    assert mine.settle([Settlement(first, Answer({}))]) == [True]
    client.zadd(BUSY, {str(of("acme")): 1})
    assert other.rescue([EVERYONE]) == (0, 0)
    assert not client.exists(BUSY)


async def test_claims_whose_reply_was_lost_are_found_in_every_tenants_queue(client, queues):
    mine, other = Ledger(client, "w"), Ledger(client, "other")
    for tenant in ("-", "acme", "b"):
        await queues.enqueue(of(tenant), [job(tenant)])
    assert len(mine.claim(ask(2))) == 2
    (theirs,) = other.claim(ask(2))
    client.zadd(BUSY, {b"\xff": 1, "nonsense": 1})
    client.delete(keys.QUEUES)
    lost = {found.queue for found in mine.orphans([EVERYONE], [])}
    assert lost == {of("-"), of("acme"), of("b")} - {theirs.queue}


async def test_empty_queues_are_forgotten_whoever_served_them(client, queues):
    old = [OLD.of(f"t{n}") for n in range(5)]
    merges = [keys.merge_queue(f"{n:032x}", tenant) for n, tenant in enumerate("-ab")]
    mine = Ledger(client, "w")
    serves = [EVERYONE, merges[0]]
    mine.roster.register(serves)
    mine.heartbeat([], Announcement())
    know(client, [*old, OLD.of("-"), *merges])
    client.sadd(f"rq:workers:{merges[1]}", "rq:worker:w")  # as it served a collection once
    client.zadd(keys.dead(old[0]), {"x": 9e9})
    client.rpush(keys.parked(merges[2]), "x")
    mine.roster.sweep(serves)
    assert known(client) == {str(of("-")), str(old[0]), str(merges[2])}
    workers = {name.decode() for name in client.keys("rq:workers:*")}
    assert workers == {f"rq:workers:{of('-')}"}
    assert client.hget("rq:worker:w", "queues") == str(of("-")).encode()


async def test_a_merge_queue_is_shown_while_something_is_in_it(client, queues):
    merge = keys.merge_queue("c0ffee", "acme")
    mine = Ledger(client, "w")
    mine.roster.register([EVERYONE, merge])
    mine.heartbeat([], Announcement())
    await queues.enqueue(of("acme"), [job("a")], Route(merge_queue=str(merge)))
    (block,) = mine.claim(ask(1))
    mine.settle([Settlement(block, HandOn(str(merge), b"s", 1))])
    mine.roster.sweep([EVERYONE, merge])
    assert str(merge) in known(client)
    assert client.smembers(f"rq:workers:{merge}") == {b"rq:worker:w"}
    (shard,) = mine.claim([Ask(merge, 1, 99)])
    assert mine.settle([Settlement(shard, Commit(1, {}))]) == [True]
    mine.roster.sweep([EVERYONE, merge])
    assert known(client) == {str(of("-"))}
    assert client.keys(f"*{merge}*") == []


async def test_pools_that_nobody_serves_any_more_are_forgotten(client, queues):
    Ledger(client, "w").heartbeat([], Announcement(pools=(EVERYONE.pool, "merge.c0ffee-0")))
    for pool in (EVERYONE.pool, "merge.c0ffee-0"):
        assert client.zrange(keys.live(pool), 0, -1) == [b"w"]
        assert keys.LEASE_TTL_S < client.ttl(keys.live(pool)) <= keys.WORKER_TTL_S


async def test_workers_that_are_gone_leave_every_queue(client, queues):
    mine = Ledger(client, "w")
    know(client, [of("acme"), OLD.of("acme")], dead=True)
    know(client, [OLD.of("-")])
    for queue in (of("acme"), OLD.of("acme"), OLD.of("-")):
        client.sadd(f"rq:workers:{queue}", "rq:worker:killed", "rq:worker:left")
    client.sadd("rq:workers", "rq:worker:killed")
    mine.roster.register([EVERYONE])
    mine.roster.sweep([EVERYONE])
    assert client.smembers("rq:workers") == {b"rq:worker:w"}
    assert client.smembers(f"rq:workers:{of('acme')}") == {b"rq:worker:w"}
    assert not client.exists(f"rq:workers:{OLD.of('acme')}")
    assert known(client) == {str(of("-")), str(of("acme")), str(OLD.of("acme"))}
    mine.roster.unregister([EVERYONE], [])
    assert client.keys("rq:workers*") == []


async def test_one_worker_at_a_time_takes_those_that_are_gone_out_of_the_queues(client, queues):
    name = f"rq:workers:{of('-')}"
    rosters = [Ledger(client, worker).roster for worker in ("a", "b")]
    for roster in rosters:
        roster.register([EVERYONE])
        roster.sweep([EVERYONE])
    assert client.get(keys.SWEEPER) == b"rq:worker:a"
    assert 0 < client.pttl(keys.SWEEPER) < 10_000
    client.sadd(name, "rq:worker:gone")
    rosters[1].sweep([EVERYONE])
    assert client.smembers(name) == {b"rq:worker:a", b"rq:worker:b", b"rq:worker:gone"}
    client.delete(keys.SWEEPER)  # its time is over
    rosters[1].sweep([EVERYONE])
    assert client.smembers(name) == {b"rq:worker:a", b"rq:worker:b"}


@pytest.mark.parametrize("count", [10, MANY])
async def test_the_sweep_comes_by_all_queues(client, queues, count):
    know(client, (OLD.of(f"t{n}") for n in range(count)))
    mine = Ledger(client, "w")
    mine.roster.register([EVERYONE])
    sweeps = 0
    while len(left := known(client)) > 1:
        assert sweeps <= 3 * (count // known_queues.AT_ONCE + 1), len(left)
        mine.roster.sweep([EVERYONE])
        sweeps += 1
        assert len(client.hget("rq:worker:w", "queues")) < 100_000
    assert left == {str(of("-"))}
