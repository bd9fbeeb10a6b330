"""The worker's scripts on a real Redis, alone and beside RQ's own code."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import redis
from rq import Queue, Retry, SimpleWorker
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry, StartedJobRegistry
from rq.worker import Worker
from servers import wait_until

from vecfleet.common import codec, keys
from vecfleet.common.admission import JOB_BYTES
from vecfleet.common.codec import Serializer
from vecfleet.common.errors import InvalidInput, PoisonText, QueueFull
from vecfleet.common.queue_client import (
    ALREADY_COMMITTED,
    ALREADY_QUEUED,
    NewJob,
    QueueClient,
    Route,
)
from vecfleet.common.redis_client import connect_async
from vecfleet.common.submission import Submissions
from vecfleet.worker.job import (
    Abandoned,
    Answer,
    Commit,
    Failure,
    HandOn,
    Refused,
    Settlement,
)
from vecfleet.worker.ledger import Announcement, Ask, Ledger

QUEUE = keys.embed_queue("5pace", "bulk")
MERGE = keys.merge_queue("c0ffee")


def job(number: int, tokens: int = 10, payload: object = None) -> NewJob:
    return NewJob(
        f"j-{number}",
        codec.pack_call("vecfleet.embed", payload or {"n": number}),
        tokens,
        number,
        5,
    )


def ledger(client: redis.Redis, name: str = "w1", lease_s: float = 10.0) -> Ledger:
    return Ledger(client, name, lease_s=lease_s)


def ids(jobs) -> list[str]:
    return [claimed.id for claimed in jobs]


async def test_claims_in_order_within_jobs_and_tokens(client, queues):
    await queues.enqueue(QUEUE, [job(n) for n in range(10)])
    mine = ledger(client)
    assert ids(mine.claim([Ask(QUEUE, 3, 1000)])) == ["j-0", "j-1", "j-2"]
    assert ids(mine.claim([Ask(QUEUE, 9, 25)])) == ["j-3", "j-4"]
    # One job passes whatever its size, or it could never pass.
    assert ids(mine.claim([Ask(QUEUE, 9, 1)])) == ["j-5"]
    assert client.hgetall(keys.load(QUEUE)) == {
        b"tokens": b"40",
        b"bytes": b"%d" % (4 * (len(job(6).data) + JOB_BYTES)),
        b"jobs": b"4",
    }
    assert len(mine.claim([Ask(QUEUE, 9, 1000)])) == 4
    assert client.hgetall(keys.load(QUEUE)) == {}


async def test_interactive_is_asked_for_apart_from_bulk(client, queues):
    fast = keys.embed_queue("5pace", "interactive")
    await queues.enqueue(QUEUE, [job(1)])
    await queues.enqueue(fast, [job(2)])
    claimed = ledger(client).claim([Ask(fast, 9, 99), Ask(QUEUE, 9, 99)])
    assert [(c.id, c.queue.lane) for c in claimed] == [("j-2", "interactive"), ("j-1", "bulk")]


async def test_the_same_job_twice_changes_nothing(client, queues):
    first = await queues.enqueue(QUEUE, [job(1)], Route(version_uid="u"))
    again = await queues.enqueue(QUEUE, [job(1), job(2)], Route(version_uid="u"))
    assert first.numbers[0] > 1_600_000_000_000_000
    assert again.numbers[0] == ALREADY_QUEUED
    assert again.numbers[1] > first.numbers[0]
    assert client.llen(keys.queue_list(QUEUE)) == 2


async def test_the_fence_lets_one_settle(client, queues):
    await queues.enqueue(QUEUE, [job(1)])
    mine = ledger(client)
    (claimed,) = mine.claim([Ask(QUEUE, 1, 99)])
    assert mine.settle([Settlement(claimed, Answer({"x": 1}))]) == [True]
    assert mine.settle([Settlement(claimed, Answer({"x": 1}))]) == [False]
    assert not client.exists(keys.job("j-1"), keys.lease(QUEUE), f"rq:wip:{QUEUE}")


def test_two_lanes_claim_at_once_and_no_two_claims_have_one_name(client, monkeypatch):
    """Executions are told apart by it: of two with one name, one lease would not be renewed."""
    mine, seen, of_thread = ledger(client), ([], []), threading.local()

    def answer(keys, args):
        of_thread.seen.append(args[3])
        return 0, [], []

    monkeypatch.setattr(mine, "_claim", answer)

    def claim(mine_seen):
        of_thread.seen = mine_seen
        for _ in range(10_000):
            mine.claim_or_wait([])

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        lanes = [threading.Thread(target=claim, args=(names,)) for names in seen]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
    finally:
        sys.setswitchinterval(usual)
    assert len({*seen[0], *seen[1]}) == 20_000


async def test_a_late_settlement_after_a_rescue_is_refused(client, queues):
    await queues.enqueue(QUEUE, [job(1)])
    slow, other = ledger(client, "slow", lease_s=0.01), ledger(client, "other")
    (stale,) = slow.claim([Ask(QUEUE, 1, 99)])
    assert wait_until(lambda: other.rescue([QUEUE]) == (1, 0))
    (fresh,) = other.claim([Ask(QUEUE, 1, 99)])
    assert fresh.attempts == 2
    assert slow.settle([Settlement(stale, Answer({}))]) == [False]
    assert slow.heartbeat([stale], Announcement()) == {stale.execution}
    assert other.settle([Settlement(fresh, Answer({}))]) == [True]


async def test_a_heartbeat_keeps_the_lease(client, queues):
    await queues.enqueue(QUEUE, [job(1)])
    mine = ledger(client, lease_s=30)
    (claimed,) = mine.claim([Ask(QUEUE, 1, 99)])
    client.zadd(keys.lease(QUEUE), {f"{claimed.id}:{claimed.execution}": 1})  # about to expire
    assert mine.heartbeat([claimed], Announcement()) == set()
    assert ledger(client, "other").rescue([QUEUE]) == (0, 0)


async def test_released_jobs_come_first_again_and_uncharged(client, queues):
    await queues.enqueue(QUEUE, [job(n) for n in range(4)])
    mine = ledger(client)
    claimed = mine.claim([Ask(QUEUE, 2, 99)])
    assert mine.release(claimed) == 2
    again = mine.claim([Ask(QUEUE, 9, 99)])
    assert ids(again) == ["j-0", "j-1", "j-2", "j-3"]
    assert {c.attempts for c in again} == {1}


async def test_three_deaths_bury_a_job_and_mark_its_block(client, queues):
    async with connect_async(client.url) as connection:
        submissions = Submissions(connection)
        await submissions.open("s", tenant="-", collection="c", uid="u")
        await queues.enqueue(QUEUE, [job(0)], Route(submission="s", merge_queue=str(MERGE)))
        await submissions.close("s", blocks=1, documents=5)
        dying, other = ledger(client, "dying", lease_s=0.01), ledger(client, "other")
        for death in range(1, keys.MAX_ATTEMPTS + 1):
            assert len(dying.claim([Ask(QUEUE, 1, 99)])) == 1
            expected = (1, 0) if death < keys.MAX_ATTEMPTS else (0, 1)
            assert wait_until(lambda: sum(found := other.rescue([QUEUE])) and found) == expected
        state = await submissions.get("s")
        assert (state.state, state.committed, state.failed) == ("done", 0, 5)
    failed = FailedJobRegistry(str(QUEUE), connection=client, serializer=Serializer)
    assert failed.get_job_ids() == ["j-0"]
    dead = Job.fetch("j-0", connection=client, serializer=Serializer)
    assert dead.get_status() == JobStatus.FAILED
    assert dead.args == [{"n": 0}]
    assert "died" in dead.latest_result().exc_string


async def test_a_block_is_counted_once_however_often_it_is_delivered(client, queues):
    async with connect_async(client.url) as connection:
        submissions = Submissions(connection)
        await submissions.open("s", tenant="-", collection="c", uid="u")
        route = Route(submission="s", merge_queue=str(MERGE))
        await queues.enqueue(QUEUE, [job(0)], route)
        mine = ledger(client)
        (claimed,) = mine.claim([Ask(QUEUE, 1, 99)])
        assert mine.settle(
            [Settlement(claimed, HandOn(str(MERGE), codec.pack_call("vecfleet.merge", b"x"), 5))]
        ) == [True]
        assert (await queues.enqueue(QUEUE, [job(0)], route)).numbers == (ALREADY_QUEUED,)
        (merging,) = mine.claim([Ask(MERGE, 1, 99)])
        assert (merging.id, merging.payload, merging.documents, merging.attempts) == (
            "j-0",
            b"x",
            5,
            1,
        )
        done = Settlement(merging, Commit(5, {"version": 1, "documents": 5}))
        assert mine.settle([done]) == [True]
        assert mine.settle([done]) == [False]
        assert (await queues.enqueue(QUEUE, [job(0)], route)).numbers == (ALREADY_COMMITTED,)
        assert await submissions.close("s", blocks=1, documents=5) == "done"
        assert (await submissions.get("s")).committed == 5
        assert client.keys("rq:job:*") == []


async def test_what_is_gone_never_reaches_an_engine(client, queues):
    async with connect_async(client.url) as connection:
        submissions = Submissions(connection)
        await submissions.open("s", tenant="-", collection="c", uid="u")
        await queues.enqueue(QUEUE, [job(1)], Route(submission="s"))
        await submissions.cancel("s")
    await queues.enqueue(QUEUE, [job(2)], Route(deadline_ms=1))
    await queues.enqueue(QUEUE, [job(3)])
    await queues.cancel(["j-3"])
    await queues.enqueue(QUEUE, [job(4)])
    mine = ledger(client)
    assert wait_until(lambda: ids(mine.claim([Ask(QUEUE, 9, 999)]))) == ["j-4"]
    assert client.keys("rq:job:*") == [b"rq:job:j-4"]
    assert client.hgetall(keys.load(QUEUE)) == {}


async def test_cancelling_a_running_job_fences_it_off(client, queues):
    await queues.enqueue(QUEUE, [job(1)])
    mine = ledger(client)
    (claimed,) = mine.claim([Ask(QUEUE, 1, 99)])
    assert await queues.cancel(["j-1"]) == 1
    assert mine.heartbeat([claimed], Announcement()) == {claimed.execution}
    assert mine.settle([Settlement(claimed, Answer({}))]) == [False]
    assert client.keys("*lease*") == []


async def test_past_the_limits_nothing_is_enqueued(client):
    from vecfleet.common.admission import Admission

    async with connect_async(client.url) as connection:
        small = QueueClient(connection, Admission(max_tokens=25, max_merge_bytes=10))
        await small.enqueue(QUEUE, [job(1), job(2)])
        with pytest.raises(QueueFull):
            await small.enqueue(QUEUE, [job(3)])
        assert client.llen(keys.queue_list(QUEUE)) == 2
        client.hset(keys.load(MERGE), "bytes", 11)
        with pytest.raises(QueueFull, match="merged"):
            await small.enqueue(
                keys.embed_queue("other", "bulk"), [job(4)], Route(merge_queue=str(MERGE))
            )
        assert not client.exists(keys.job("j-4"))


async def test_a_full_redis_refuses_new_work_and_lets_the_old_go(client, queues):
    big = {"blob": b"x" * 200_000}
    await queues.enqueue(QUEUE, [job(n, payload=big) for n in range(8)])
    mine = ledger(client)
    claimed = mine.claim([Ask(QUEUE, 3, 999)])
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", client.info("memory")["used_memory"] - 100_000)
    with pytest.raises(QueueFull):
        await queues.enqueue(QUEUE, [job(99, payload=big)])
    assert not client.exists(keys.job("j-99"))
    assert mine.heartbeat(claimed, Announcement()) == set()
    assert mine.settle([Settlement(claimed[0], Answer({"ok": True}))]) == [True]
    assert mine.release(claimed[1:]) == 2
    assert len(mine.claim([Ask(QUEUE, 9, 9999)])) == 7


async def test_claims_whose_reply_was_lost_are_found(client, queues):
    await queues.enqueue(QUEUE, [job(n) for n in range(4)])
    mine, other = ledger(client), ledger(client, "w2")
    kept = mine.claim([Ask(QUEUE, 1, 99)])
    mine.claim([Ask(QUEUE, 2, 99)])  # as if this reply had been lost
    other.claim([Ask(QUEUE, 1, 99)])
    assert sorted(ids(mine.orphans([QUEUE], kept))) == ["j-1", "j-2"]


async def test_a_suspect_is_claimed_alone(client, queues):
    await queues.enqueue(QUEUE, [job(n) for n in range(4)])
    dying, other = ledger(client, "dying", lease_s=0.01), ledger(client, "other")
    assert len(dying.claim([Ask(QUEUE, 2, 99)])) == 2
    assert wait_until(lambda: other.rescue([QUEUE]) == (2, 0))
    assert other.claim([Ask(QUEUE, 9, 99, is_alone=False)]) == []
    first = other.claim([Ask(QUEUE, 9, 99)])
    second = other.claim([Ask(QUEUE, 9, 99)])
    assert (len(first), len(second)) == (1, 1)
    assert sorted(ids(first + second)) == ["j-0", "j-1"]
    assert ids(other.claim([Ask(QUEUE, 9, 99)])) == ["j-2", "j-3"]


async def test_a_suspect_is_not_starved_by_another_queue(client, queues):
    busy = keys.embed_queue("another", "bulk")
    await queues.enqueue(QUEUE, [job(1)])
    dying, other = ledger(client, "dying", lease_s=0.01), ledger(client, "other")
    assert len(dying.claim([Ask(QUEUE, 2, 99)])) == 1
    assert wait_until(lambda: other.rescue([QUEUE]) == (1, 0))
    await queues.enqueue(busy, [job(n) for n in range(10, 20)])
    asks = [Ask(busy, 3, 99, is_alone=False), Ask(QUEUE, 3, 99, is_alone=False)]
    jobs, needs_calm = other.claim_or_wait(asks)
    assert (len(jobs), needs_calm) == (3, True)
    jobs, needs_calm = other.claim_or_wait([Ask(busy, 3, 99), Ask(QUEUE, 3, 99)])
    assert (ids(jobs), needs_calm) == (["j-1"], False)


@pytest.mark.parametrize("field", ["tokens", "block", "documents"])
async def test_numbers_that_are_none_are_refused_before_anything_is_written(client, queues, field):
    bad = replace(job(1), **{field: 12.5})
    with pytest.raises(InvalidInput):
        await queues.enqueue(QUEUE, [bad])
    assert client.keys("*") == []


async def test_rqs_requeue_brings_a_dead_job_back(client, queues):
    async with connect_async(client.url) as connection:
        submissions = Submissions(connection)
        await submissions.open("s", tenant="-", collection="c", uid="u")
        await queues.enqueue(QUEUE, [job(0)], Route(submission="s", merge_queue=str(MERGE)))
        await submissions.close("s", blocks=1, documents=5)
        mine = ledger(client)
        (claimed,) = mine.claim([Ask(QUEUE, 1, 99)])
        mine.settle([Settlement(claimed, Failure(InvalidInput("no")))])
        assert (await submissions.get("s")).failed == 5
        failed = FailedJobRegistry(str(QUEUE), connection=client, serializer=Serializer)
        failed.requeue("j-0")
        (again,) = mine.claim([Ask(QUEUE, 1, 99)])
        assert (again.payload, again.merge_queue) == ({"n": 0}, str(MERGE))
        mine.settle([Settlement(again, Commit(5, {"version": 1, "documents": 5}))])
        state = await submissions.get("s")
        assert (state.state, state.committed, state.failed) == ("done", 5, 0)


def test_a_stock_queue_can_enqueue_and_fetch_the_result(client):
    stock = Queue(str(QUEUE), connection=client, serializer=Serializer)
    theirs = stock.enqueue("vecfleet.embed", {"texts": ["a"]}, result_ttl=60)
    mine = ledger(client)
    (claimed,) = mine.claim([Ask(QUEUE, 1, 99)])
    assert (claimed.function, claimed.payload, claimed.is_stock) == (
        "vecfleet.embed",
        {"texts": ["a"]},
        True,
    )
    assert theirs.get_status() == JobStatus.STARTED
    assert StartedJobRegistry(str(QUEUE), connection=client).get_job_ids() == [theirs.id]
    assert mine.settle([Settlement(claimed, Answer({"vectors": b"\x00\x01"}))]) == [True]
    done = Job.fetch(theirs.id, connection=client, serializer=Serializer)
    assert done.get_status() == JobStatus.FINISHED
    assert done.return_value() == {"vectors": b"\x00\x01"}
    assert theirs.id in stock.finished_job_registry
    assert 0 < client.ttl(done.key) <= 60


def test_a_stock_job_that_fails_is_in_rqs_failed_registry(client):
    stock = Queue(str(QUEUE), connection=client, serializer=Serializer)
    theirs = stock.enqueue("os.system", "true")
    mine = ledger(client)
    (claimed,) = mine.claim([Ask(QUEUE, 1, 99)])
    mine.settle([Settlement(claimed, Failure(InvalidInput("no such function")))])
    assert theirs.get_status() == JobStatus.FAILED
    assert theirs.id in stock.failed_job_registry
    assert (
        "no such function"
        in Job.fetch(theirs.id, connection=client, serializer=Serializer).latest_result().exc_string
    )


def test_a_stock_jobs_retries_are_honoured(client):
    stock = Queue(str(QUEUE), connection=client, serializer=Serializer)
    theirs = stock.enqueue("vecfleet.embed", {}, retry=Retry(max=2))
    mine = ledger(client)
    for expected in (JobStatus.QUEUED, JobStatus.QUEUED, JobStatus.FAILED):
        (claimed,) = mine.claim([Ask(QUEUE, 1, 99)])
        assert mine.settle([Settlement(claimed, Failure(InvalidInput("no")))]) == [True]
        assert theirs.get_status() == expected


def _shape(client: redis.Redis, names: dict[str, str]) -> dict[str, object]:
    """Every rq key with its type, its fields where it is a hash, ids replaced by what they are."""
    shape = {}
    for raw in client.keys("rq:*"):
        name = raw.decode()
        kind = client.type(raw).decode()
        fields = sorted(f.decode() for f in client.hkeys(raw)) if kind == "hash" else None
        if kind == "zset":
            fields = [m.decode().count(":") for m in client.zrange(raw, 0, -1)]
        for value, word in names.items():
            name = name.replace(value, word)
        shape[name] = (kind, fields)
    return shape


def _echo(payload):
    return payload


def test_keys_stand_where_rqs_own_handlers_put_them(client):
    """A new RQ version that moves a key or a field shows here."""
    stock = Queue("q", connection=client, serializer=Serializer)
    shapes = []
    for run in ("rq", "ours"):
        client.flushall()
        theirs = stock.enqueue(_echo, {"a": 1}, result_ttl=60)
        if run == "rq":
            worker = SimpleWorker([stock], connection=client, serializer=Serializer, name="w1")
            worker.register_birth()
            taken, _ = worker.dequeue_job_and_maintain_ttl(None)
            execution = worker.prepare_execution(taken)
            worker.prepare_job_execution(taken, remove_from_intermediate_queue=True)
        else:
            mine = ledger(client)
            queue = keys.QueueName("-", "embed", "x", "bulk")
            client.rename("rq:queue:q", keys.queue_list(queue))
            client.hset(theirs.key, "origin", str(queue))
            mine.roster.register([queue])
            (claimed,) = mine.claim([Ask(queue, 1, 9999)])
            execution = claimed
        names = {theirs.id: "ID", "vf.-.embed.x.bulk": "q"}
        names[execution.id if run == "rq" else execution.execution] = "EX"
        started = _shape(client, names)
        if run == "rq":
            taken.started_at = taken.created_at
            taken.ended_at = taken.created_at
            taken._result = {"a": 1}
            worker.handle_job_success(taken, stock, stock.started_job_registry)
        else:
            mine.settle([Settlement(claimed, Answer({"a": 1}))])
        shapes.append((started, _shape(client, names)))
    for rq, ours in zip(*shapes, strict=True):
        extra = {"rq:queues", "rq:worker:w1", "rq:workers", "rq:workers:q", "rq:workers:vf"}
        assert {k: v[0] for k, v in rq.items() if k not in extra} == {
            k: v[0] for k, v in ours.items() if k not in extra
        }
        for name, (kind, fields) in rq.items():
            if kind == "zset":
                assert ours[name] == (kind, fields), name
            elif kind == "hash" and name != "rq:worker:w1":
                needed = set(fields) - {"last_heartbeat", "group_id"}
                assert needed <= set(ours[name][1]) | {"ended_at"}, name


async def test_rq_info_tells_the_truth_and_moves_nothing(client, queues):
    await queues.enqueue(QUEUE, [job(n) for n in range(5)])
    mine = ledger(client, lease_s=3600)
    mine.roster.register([QUEUE])
    mine.heartbeat([], Announcement())
    claimed = mine.claim([Ask(QUEUE, 2, 99)])
    for expired in claimed:
        client.zadd(keys.lease(QUEUE), {f"{expired.id}:{expired.execution}": 1})
    client.hset(keys.job(claimed[0].id), "meta", b"\x80\x04never unpickled")

    def everything() -> dict[bytes, bytes]:
        names = [name for name in client.keys("*") if not name.startswith(b"rq:worker")]
        return {name: client.dump(name) for name in names}

    before = everything()
    shown = subprocess.run(
        [sys.executable, "-m", "rq.cli", "info", "-u", client.url, "-R", str(QUEUE)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.returncode == 0, shown.stderr
    assert "3, 2 executing, 0 finished, 0 failed" in shown.stdout
    assert "w1" in shown.stdout and "1 workers" in shown.stdout
    assert everything() == before
    (seen,) = Worker.all(connection=client)
    assert (seen.name, seen.queue_names()) == ("w1", [str(QUEUE)])


async def test_retries_that_somebody_wrote_by_hand_come_to_an_end(client):
    mine = ledger(client)
    for number, retries in enumerate((b"inf", b"1e9", b"abc", b"-1", b"")):
        name = f"hand-{number}"
        data = codec.pack_call("vecfleet.embed", {})
        fields = {"data": data, "status": "queued", "origin": str(QUEUE), "retries_left": retries}
        client.hset(keys.job(name), mapping=fields)
        client.rpush(keys.queue_list(QUEUE), name)
        (claimed,) = mine.claim([Ask(QUEUE, 1, 99)])
        assert mine.settle([Settlement(claimed, Failure(InvalidInput("no")))]) == [True]
        assert client.hget(keys.job(name), "status") == b"failed"


WRONG = {
    "vf_cost": b"9" * 16,
    "vf_deadline": b"",
    "vf_attempts": b"-1000",
    "vf_block": b"nan",
    "vf_docs": b"9" * 400,
    "vf_refused": b"-1",
    "vf_version": b"1e400",
    "vf_sub": b"x:ok",
    "vf_box": b"\xff",
    "vf_merge": b"\xff\xfe",
    "timeout": b"9" * 400,
    "result_ttl": b"x",
    "vf_condemned": b",,x",
    "vf_named": b"*",
    "vf_deaths": b"1.5",
    "vf_at": b"",
}


@pytest.mark.parametrize("wrong", [*WRONG, "all of them"])
async def test_a_job_that_was_written_wrong_holds_nobody_up(client, queues, wrong):
    """A script that fails at the head of a queue would fail for all behind it, and for ever."""
    fields = WRONG if wrong == "all of them" else {wrong: WRONG[wrong]}
    own = {"data": codec.pack_call("vecfleet.embed", {}), "status": "queued", "origin": str(QUEUE)}
    client.hset(keys.job("wrong"), mapping={**own, **fields})
    client.rpush(keys.queue_list(QUEUE), "wrong")
    await queues.enqueue(QUEUE, [job(1)])
    mine = ledger(client)
    claimed = mine.claim([Ask(QUEUE, 9, 999)])
    assert ids(claimed) == ["wrong", "j-1"]
    batch = [Settlement(one, Failure(InvalidInput("no"))) for one in claimed]
    assert mine.settle(batch) == [True, True]
    assert client.hget(keys.job("wrong"), "status") == b"failed"


@pytest.mark.parametrize("wrong", [*WRONG, "all of them"])
async def test_a_job_that_was_written_wrong_is_rescued_and_refused_in_part(client, wrong):
    """A script that fails once it has taken the lease away would leave the job nowhere."""
    fields = WRONG if wrong == "all of them" else {wrong: WRONG[wrong]}
    own = {"data": codec.pack_call("vecfleet.embed", {}), "status": "queued", "origin": str(QUEUE)}
    client.hset(keys.job("wrong"), mapping={**own, **fields})
    client.rpush(keys.queue_list(QUEUE), "wrong")
    mine, other = ledger(client), ledger(client, "other")
    (first,) = mine.claim([Ask(QUEUE, 9, 999)])
    assert mine.settle([Settlement(first, Abandoned())]) == [True]
    assert other.rescue([QUEUE]) == (1, 0)
    assert client.hget(keys.job("wrong"), "vf_deaths") == b"1"
    (again,) = other.claim([Ask(QUEUE, 9, 999)])
    assert again.is_suspect
    apart = [Refused(0, "d", PoisonText(), codec.pack_call("vecfleet.embed", {}), 1)]
    assert other.settle([Settlement(again, HandOn(str(MERGE), b"x", 1, apart))]) == [True]
    assert client.zrange(keys.dead(QUEUE), 0, -1) == [b"wrong-refused-0"]


@pytest.mark.parametrize("ttl_s", [10**17, 10**18 - 1, -1])
async def test_a_result_that_is_to_be_kept_for_ever_and_longer_is_kept(client, ttl_s):
    name = "kept"
    data = codec.pack_call("vecfleet.embed", {})
    fields = {"data": data, "status": "queued", "origin": str(QUEUE), "result_ttl": ttl_s}
    client.hset(keys.job(name), mapping=fields)
    client.rpush(keys.queue_list(QUEUE), name)
    mine = ledger(client)
    (claimed,) = mine.claim([Ask(QUEUE, 1, 99)])
    assert mine.settle([Settlement(claimed, Answer({}))]) == [True]
    assert client.hget(keys.job(name), "status") == b"finished"
    assert client.ttl(keys.job(name)) == client.ttl(f"rq:results:{name}")
    assert client.zrange(f"rq:finished:{QUEUE}", 0, -1) == [name.encode()]


async def test_what_is_no_job_is_left_out(client, queues):
    client.set(keys.job("a-string"), "x")
    for name in ("a-string", "a:b", "a\nb", b"\xff\xfe", "x" * 300):
        client.rpush(keys.queue_list(QUEUE), name)
    await queues.enqueue(QUEUE, [job(1)])
    assert ids(ledger(client).claim([Ask(QUEUE, 9, 999)])) == ["j-1"]


async def test_a_job_that_was_cancelled_and_enqueued_again_has_one_holder(client, queues):
    await queues.enqueue(QUEUE, [job(1), job(2)])
    await queues.cancel(["j-2"])
    await queues.enqueue(QUEUE, [job(2)])
    assert client.lrange(keys.queue_list(QUEUE), 0, -1) == [b"j-1", b"j-2", b"j-2"]
    assert ids(ledger(client).claim([Ask(QUEUE, 9, 999)])) == ["j-1", "j-2"]
    assert client.zcard(keys.lease(QUEUE)) == 2


async def test_a_dead_job_is_not_taken_by_an_id_that_stayed_behind(client, queues):
    await queues.enqueue(QUEUE, [job(1)])
    await queues.cancel(["j-1"])
    await queues.enqueue(QUEUE, [job(1)])
    mine = ledger(client)
    (taken,) = mine.claim([Ask(QUEUE, 1, 999)])
    assert mine.settle([Settlement(taken, Failure(InvalidInput("no")))]) == [True]
    assert client.lrange(keys.queue_list(QUEUE), 0, -1) == [b"j-1"]
    assert mine.claim([Ask(QUEUE, 9, 999)]) == []
    assert client.hget(keys.job("j-1"), "status") == b"failed"
    assert client.zrange(f"rq:failed:{QUEUE}", 0, -1) == [b"j-1"]
