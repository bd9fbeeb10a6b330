"""Tenants take turns, within bounds that hold for all of them together; on each Redis there is."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
import redis
from rq import Queue
from servers import eventually, wait_until

from vecfleet.common import codec, keys
from vecfleet.common.admission import JOB_BYTES, Admission
from vecfleet.common.codec import Serializer
from vecfleet.common.errors import QueueFull
from vecfleet.common.fleet_state import read_fleet_state
from vecfleet.common.queue_client import NewJob, QueueClient, Route
from vecfleet.common.redis_client import connect, connect_async
from vecfleet.worker.batch_worker import BatchWorker
from vecfleet.worker.handlers import One
from vecfleet.worker.heartbeat import Timing
from vecfleet.worker.job import Answer, Commit, HandOn, Settlement
from vecfleet.worker.ledger import Announcement, Ask, Ledger
from vecfleet.worker.window import Window

EVERYONE = keys.embed_queue("5pace", "bulk", keys.EVERY_TENANT)
LINE, CLOCK, SUM = (f"vf:{name}:{EVERYONE.line}" for name in ("line", "clock", "sum"))


def of(tenant: str) -> keys.QueueName:
    return EVERYONE.of(tenant)


def jobs(tenant: str, count: int, tokens: int = 10, size: int = 0, first: int = 0) -> list[NewJob]:
    data = codec.pack_call("vecfleet.embed", {"blob": b"x" * size})
    return [NewJob(f"{tenant}-{n}", data, tokens, n, 1) for n in range(first, first + count)]


def tenants_of(claimed) -> Counter[str]:
    return Counter(job.queue.tenant for job in claimed)


def ask(most: int, tokens: int = 1_000_000) -> list[Ask]:
    return [Ask(EVERYONE, most, tokens)]


def waiting(client: redis.Redis, key: str) -> dict[bytes, int]:
    return {name: int(value) for name, value in client.hgetall(key).items()}


async def test_jobs_that_cost_nothing_are_jobs_too(client, queues):
    """Lua knows a -0, which Redis takes for no number."""
    mine = Ledger(client, "w", max_merge_bytes=10)
    await fill_merge_queue(client, queues, mine, "full", 1)
    await queues.enqueue(of("-"), jobs("free", 3, tokens=0))
    await queues.enqueue(
        of("-"), jobs("parked", 2, tokens=0), Route(merge_queue="vf.-.merge.full-0.bulk")
    )
    assert len(mine.claim(ask(2))) == 2
    assert len(mine.claim(ask(2))) == 1
    assert await queues.cancel(["free-0", "parked-0"]) == 2
    (shard,) = mine.claim([Ask(merge_of("full"), 9, 99)])
    assert mine.settle([Settlement(shard, Commit(1, {}))]) == [True]
    assert [job.id for job in mine.claim(ask(9))] == ["parked-1"]
    assert client.exists(SUM, LINE, CLOCK) == 0


async def test_nobody_needs_to_be_told_of_a_tenant(client, queues):
    mine = Ledger(client, "w")
    for tenant in ("-", "acme", "b-c_d"):
        await queues.enqueue(of(tenant), jobs(tenant, 1))
    claimed = mine.claim(ask(9))
    assert {job.queue for job in claimed} == {of("-"), of("acme"), of("b-c_d")}
    assert mine.settle([Settlement(job, Answer({})) for job in claimed]) == [True] * 3
    assert client.keys("rq:job:*") == []
    assert client.exists(LINE, CLOCK, SUM) == 0


async def test_a_claim_asks_only_tenants_with_something_waiting(client, queues):
    mine = Ledger(client, "w")
    for n in range(100):
        await queues.enqueue(of(f"t{n}"), jobs(f"t{n}", 1))
    while mine.claim(ask(9)):
        pass
    for n in (7, 50, 99):
        await queues.enqueue(of(f"t{n}"), jobs(f"t{n}", 1, first=1))
    client.config_resetstat()
    assert tenants_of(mine.claim(ask(9))) == Counter(["t7", "t50", "t99"])
    asked = client.info("commandstats")["cmdstat_lindex"]["calls"]
    assert asked <= 3 * 4  # a look for suspects, the job, and that there is no second one


async def test_shares_are_equal_in_tokens_whatever_waits(client, queues):
    """A flood of small jobs, few large ones, and one who comes late."""
    mine = Ledger(client, "w")
    await queues.enqueue(of("flood"), jobs("flood", 1000, tokens=10))
    await queues.enqueue(of("large"), jobs("large", 20, tokens=100))
    shares: Counter[str] = Counter()
    for _ in range(20):
        for job in mine.claim(ask(50, 100)):
            shares[job.queue.tenant] += job.tokens
    assert shares["large"] > 800
    assert abs(shares["flood"] - shares["large"]) <= 200

    await queues.enqueue(of("late"), jobs("late", 5, tokens=10))
    next_ones = [job.queue.tenant for job in mine.claim(ask(12, 1000))]
    # No credit for the time before: it shares from now on; and it waits for no backlog.
    assert "late" in next_ones[:3]
    assert next_ones.count("late") <= 6


async def test_who_comes_back_often_gains_nothing(client, queues):
    """One job at a time, a new one whenever it is gone, beside one with a backlog."""
    mine = Ledger(client, "w")
    await queues.enqueue(of("steady"), jobs("steady", 200))
    shares: Counter[str] = Counter()
    for n in range(100):
        await queues.enqueue(of("sly"), jobs("sly", 1, first=n))
        shares += tenants_of(mine.claim(ask(1)))
    assert 40 <= shares["steady"] <= 60, shares
    assert client.zcard(LINE) <= 2
    assert client.zcard(CLOCK) <= 1


async def test_a_crowd_of_tenants_is_served_in_turn(client, queues):
    """More tenants than one claim looks at: none is passed over."""
    mine = Ledger(client, "w")
    for n in range(100):
        await queues.enqueue(of(f"t{n}"), jobs(f"t{n}", 10))
    order = [job.queue.tenant for _ in range(10) for job in mine.claim(ask(20))]
    for at in range(0, 200, 100):
        assert len(set(order[at : at + 100])) >= 60
    assert len(set(order)) == 100
    assert max(Counter(order).values()) <= 4


async def test_a_dead_workers_jobs_are_rescued_in_every_tenants_queue(client, queues):
    dying, other = Ledger(client, "dying", lease_s=0.01), Ledger(client, "other")
    for tenant in ("-", "acme"):
        await queues.enqueue(of(tenant), jobs(tenant, 1))
    assert len(dying.claim(ask(9))) == 2
    rescued = Counter[str]()

    def both() -> bool:
        rescued["n"] += other.rescue([EVERYONE])[0]
        return rescued["n"] == 2

    assert wait_until(both)
    first, second = other.claim(ask(9)), other.claim(ask(9))  # suspects go alone
    assert tenants_of([*first, *second]) == Counter(["-", "acme"])
    assert other.orphans([EVERYONE], []) != []
    assert other.orphans([EVERYONE], [*first, *second]) == []


async def test_what_a_stock_queue_pushes_is_found_for_every_tenant(client):
    mine = Ledger(client, "w")
    for tenant in ("-", "acme"):
        stock = Queue(str(of(tenant)), connection=client, serializer=Serializer)
        stock.enqueue("vecfleet.embed", {"texts": ["a"]})
    found: Counter[str] = Counter()

    def both() -> bool:
        nonlocal found
        mine.rescue([EVERYONE])
        found += tenants_of(mine.claim(ask(9)))
        return set(found) == {"-", "acme"}

    assert wait_until(both)
    assert client.exists(LINE, CLOCK, SUM) == 0


async def test_tenants_that_went_away_are_forgotten(client, queues):
    mine = Ledger(client, "w")
    mine.roster.register([EVERYONE])
    for tenant in ("gone", "waits", "works"):
        await queues.enqueue(of(tenant), jobs(tenant, 1))
    claimed = mine.claim(ask(9))
    mine.settle([Settlement(job, Answer({})) for job in claimed if job.queue.tenant != "works"])
    await queues.enqueue(of("waits"), jobs("waits", 1, first=5))
    mine.rescue([EVERYONE])
    mine.roster.sweep([EVERYONE])
    names = {name.decode().split(".")[1] for name in client.smembers(keys.QUEUES)}
    assert names == {"-", "waits", "works"}
    assert client.keys("*gone*") == []
    await queues.enqueue(of("gone"), jobs("gone", 1, first=7))
    assert tenants_of(mine.claim(ask(9))) == Counter(["gone", "waits"])


async def test_all_together_stay_within_the_bound_and_leave_room_for_the_next(client):
    bound = 200 * (2000 + JOB_BYTES)
    async with connect_async(client.url) as connection:
        small = QueueClient(connection, Admission(max_shared_bytes=bound))
        held: Counter[str] = Counter()
        for tenant in ("one", "two", "three", "four"):
            for n in range(1000):
                try:
                    await small.enqueue(of(tenant), jobs(tenant, 1, size=2000, first=n))
                except QueueFull as error:
                    assert "tenants" in str(error)
                    break
                held[tenant] += 1
        total = waiting(client, SUM)
        assert total[b"bytes"] <= bound
        assert total[b"jobs"] == sum(held.values())
        assert held["one"] > 90, "one alone gets half"
        assert held["four"] >= 5, "and the fourth still something"
        mine = Ledger(client, "w")
        while mine.claim(ask(100)):
            pass
        assert client.exists(SUM, LINE, CLOCK) == 0


async def test_the_sums_are_the_sum_of_the_loads(client, queues):
    mine = Ledger(client, "w")
    for tenant in ("a", "b"):
        await queues.enqueue(of(tenant), jobs(tenant, 6, tokens=7))
    claimed = mine.claim(ask(5))
    mine.release(claimed[:2])
    await queues.cancel([client.lindex(keys.queue_list(of("a")), 0).decode()])
    await queues.cancel([claimed[4].id])
    loads = [waiting(client, keys.load(of(tenant))) for tenant in ("a", "b")]
    assert waiting(client, SUM) == dict(Counter(loads[0]) + Counter(loads[1]))
    assert waiting(client, SUM)[b"jobs"] == 8
    # What stock tools take out is made good when the queue runs empty.
    client.delete(keys.queue_list(of("a")))
    while mine.claim(ask(5)):
        pass
    await queues.enqueue(of("a"), jobs("new", 1))
    assert len(mine.claim(ask(5))) == 1
    assert client.exists(SUM, LINE, CLOCK) == 0


# Parking


def merge_of(collection: str) -> keys.QueueName:
    return keys.merge_queue(collection)


async def fill_merge_queue(client, queues, mine, collection: str, shards: int) -> None:
    """Blocks of a collection that are embedded, and that nobody merges."""
    route = Route(merge_queue=str(merge_of(collection)))
    await queues.enqueue(of("-"), jobs(f"{collection}-early", shards), route)
    claimed = mine.claim(ask(shards))
    outcome = HandOn(str(merge_of(collection)), b"s" * 1000, 1)
    assert all(mine.settle([Settlement(job, outcome) for job in claimed]))


async def test_blocks_of_a_full_collection_stand_in_nobodys_way(client, queues):
    mine = Ledger(client, "w", max_merge_bytes=2500)
    await fill_merge_queue(client, queues, mine, "stuck", 3)
    stuck, other = (Route(merge_queue=str(merge_of(name))) for name in ("stuck", "other"))
    await queues.enqueue(of("-"), jobs("stuck", 300), stuck)
    await queues.enqueue(of("-"), jobs("other", 2), other)
    await queues.enqueue(of("-"), jobs("query", 1))
    claimed = mine.claim(ask(9))
    assert [job.id for job in claimed] == ["other-0", "other-1", "query-0"]
    assert client.llen(f"vf:parked:{merge_of('stuck')}") == 300
    # It counts with the collection that is full, no more with the queue that others use.
    assert client.exists(keys.load(of("-"))) == 0
    load = waiting(client, keys.load(merge_of("stuck")))
    assert (load[b"jobs"], load[b"parked_jobs"]) == (3, 300)
    assert waiting(client, SUM)[b"jobs"] == 300
    async with connect_async(client.url) as connection:
        small = QueueClient(connection, Admission(max_merge_bytes=2500))
        with pytest.raises(QueueFull, match="merged"):
            await small.enqueue(of("-"), jobs("more", 1), stuck)
        await small.enqueue(of("-"), jobs("more", 1), other)


async def test_what_is_parked_and_what_all_tenants_wait_for_can_be_seen(client, queues):
    mine = Ledger(client, "w", max_merge_bytes=2500)
    await fill_merge_queue(client, queues, mine, "stuck", 3)
    stuck = Route(merge_queue=str(merge_of("stuck")))
    await queues.enqueue(of("-"), jobs("-", 2, size=1000), stuck)
    assert mine.claim(ask(9)) == []
    await queues.enqueue(of("a"), jobs("a", 3))
    async with connect_async(client.url) as connection:
        state = await read_fleet_state(connection)
    merge = next(queue for queue in state.queues if queue.queue == str(merge_of("stuck")))
    assert (merge.jobs, merge.parked) == (3, 2)
    assert merge.bytes == 3 * (1000 + JOB_BYTES)
    assert 2000 < merge.parked_bytes - 2 * JOB_BYTES < 3000
    lines = {line.line: line for line in state.lines}
    shared = lines[EVERYONE.line]
    assert (shared.jobs, shared.tokens, shared.tenants) == (5, 50, 1)
    assert (lines["merge"].jobs, lines["merge"].tenants) == (3, 0)
    assert state.queues_left_out == 0


async def test_what_is_not_shown_is_counted(client, monkeypatch):
    monkeypatch.setattr("vecfleet.common.fleet_state.MAX_QUEUES", 2)
    for name in ("a", "b", "c"):
        client.sadd(keys.QUEUES, keys.queue_list(of(name)))
    async with connect_async(client.url) as connection:
        state = await read_fleet_state(connection)
    assert len(state.queues) == 2
    assert state.queues_left_out == 1


async def test_of_too_many_queues_the_busy_ones_are_shown(client, queues, monkeypatch):
    monkeypatch.setattr("vecfleet.common.fleet_state.MAX_QUEUES", 2)
    for n in range(1500):
        client.sadd(keys.QUEUES, keys.queue_list(keys.merge_queue(f"{n:032x}")))
    for tenant in ("works", "waits"):
        await queues.enqueue(of(tenant), jobs(tenant, 1))
    assert len(Ledger(client, "w").claim(ask(1))) == 1
    async with connect_async(client.url) as connection:
        state = await read_fleet_state(connection)
    assert [queue.queue for queue in state.queues] == [str(of("waits")), str(of("works"))]
    assert state.queues_left_out == 1500
    assert {line.line: line.jobs for line in state.lines} == {EVERYONE.line: 1, "merge": 0}


async def test_all_that_was_parked_drains_when_the_aggregator_comes_back(client, queues):
    mine = Ledger(client, "w", max_merge_bytes=2500)
    await fill_merge_queue(client, queues, mine, "stuck", 3)
    stuck = merge_of("stuck")
    await queues.enqueue(of("-"), jobs("j", 200), Route(merge_queue=str(stuck)))
    assert mine.claim(ask(9)) == []
    assert await queues.cancel(["j-0", "j-150", "nothing"]) == 2
    back = Ledger(client, "aggregator", max_merge_bytes=2500)
    merged: list[str] = []
    for _ in range(1000):
        shards = back.claim([Ask(stuck, 2, 1_000_000)])
        back.settle([Settlement(job, Commit(1, {})) for job in shards])
        merged += [job.id for job in shards]
        blocks = mine.claim(ask(4))
        mine.settle([Settlement(job, HandOn(str(stuck), b"s" * 1000, 1)) for job in blocks])
        assert client.llen(keys.queue_list(stuck)) <= 3 + 4, "what is in flight at most"
    parked_first = [name for name in merged if name.startswith("j-")]
    assert set(parked_first) == {f"j-{n}" for n in range(200)} - {"j-0", "j-150"}
    assert len(merged) == len(set(merged)) == 198 + 3
    assert client.keys("vf:parked:*") == client.keys("vf:load:*") == client.keys("vf:sum:*") == []
    assert client.keys("vf:line:*") == client.keys("rq:job:*") == []


async def test_one_call_looks_at_no_more_than_it_may(client, queues):
    mine = Ledger(client, "w", max_merge_bytes=10)
    await fill_merge_queue(client, queues, mine, "stuck", 1)
    for start in range(0, 3000, 500):
        batch = jobs("j", 500, first=start)
        await queues.enqueue(of("-"), batch, Route(merge_queue=str(merge_of("stuck"))))
    await queues.enqueue(of("-"), jobs("other", 1), Route(merge_queue=str(merge_of("other"))))
    parked = f"vf:parked:{merge_of('stuck')}"
    assert mine.claim(ask(9)) == []
    assert client.llen(parked) == 1024
    assert client.exists(keys.bell(EVERYONE)), "and is called again"
    assert mine.claim(ask(9)) == []
    (found,) = mine.claim(ask(9))
    assert (found.id, client.llen(parked)) == ("other-0", 3000)


# The worker


class SlowEngine:
    """Runs one job after the other, and tells in which order."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.may_run = asyncio.Semaphore(0)

    async def __call__(self, job):
        async with asyncio.timeout(20):
            await self.may_run.acquire()
        self.order.append(job.queue.tenant)
        return Answer({})


@pytest.mark.parametrize("lane", keys.LANES)
async def test_a_tenant_waits_for_one_window_and_its_turn(redis_url, lane):
    """A million tokens of one tenant wait; another's jobs pass, in both lanes."""
    line = keys.embed_queue("5pace", lane, keys.EVERY_TENANT)
    engine, stop, hurry = SlowEngine(), asyncio.Event(), asyncio.Event()
    async with connect_async(redis_url) as connection:
        queues = QueueClient(connection)
        await queues.enqueue(line.of("flood"), jobs("flood", 1000, tokens=1000))
        worker = BatchWorker(
            Ledger(connect(redis_url), "w"),
            queues=lambda: [line],
            handlers={"vecfleet.embed": One(engine)},
            windows={lane: Window(max_tokens=8000, max_jobs=64)},
            announce=lambda: Announcement(pools=(line.pool,)),
            timing=Timing(heartbeat_s=0.05, rescue_s=0.05, drain_s=0.1),
        )
        running = asyncio.create_task(worker.run(stop, hurry=hurry))
        try:
            with connect(redis_url) as client:
                await eventually(lambda: client.zcard(keys.lease(line.of("flood"))) == 8)
            await queues.enqueue(line.of("quiet"), jobs("quiet", 4, tokens=1000))
            for done in range(1, 31):
                engine.may_run.release()
                await eventually(lambda done=done: len(engine.order) == done)
        finally:
            stop.set()
            hurry.set()
            await running
    places = [at for at, tenant in enumerate(engine.order) if tenant == "quiet"]
    assert places[0] <= 8 + 2, "one window and a turn"
    assert len(places) == 4
    assert places[-1] <= 8 + 2 * 4 + 8, "then every other one"
