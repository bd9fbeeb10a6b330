"""The worker's chores on a real Redis: one that Redis refuses keeps no other waiting."""

from __future__ import annotations

import threading

import pytest
from servers import wait_until

from vecfleet.common import codec, keys
from vecfleet.common.errors import ConfigError, QueueFull, RedisUnavailable, VecfleetError
from vecfleet.common.queue_client import NewJob
from vecfleet.common.redis_client import connect
from vecfleet.worker.heartbeat import Counts, Heartbeat, Timing
from vecfleet.worker.ledger import Announcement, Ask, Ledger

QUEUE = keys.embed_queue("5pace", "bulk")


@pytest.fixture
def heartbeat(client):
    """Starts the chores of a worker, a few milliseconds apart, until the test is over."""
    over, threads = threading.Event(), []

    def start(mine: Ledger) -> None:
        chores = Heartbeat(
            mine,
            queues=lambda: [QUEUE],
            announce=Announcement,
            timing=Timing(heartbeat_s=0.02, rescue_s=0.02),
            jobs=list,
            take_counts=Counts,
            on_lost=lambda lost: None,
            on_event=lambda name, count: None,
        )
        threads.append(threading.Thread(target=chores.run, args=(threading.Event(), over)))
        threads[0].start()

    yield start
    over.set()
    for thread in threads:
        thread.join()


async def enqueued(queues, count: int) -> None:
    data = codec.pack_call("vecfleet.embed", {})
    await queues.enqueue(QUEUE, [NewJob(f"j-{n}", data, 1) for n in range(count)])


async def test_the_dead_are_looked_for_although_the_sweep_fails(
    client, queues, heartbeat, monkeypatch
):
    """As with an ACL of an older version: it would wait a whole lease each time."""
    monkeypatch.setattr("vecfleet.worker.heartbeat._SWEEP_S", 0.0)
    mine = Ledger(client, "w")
    monkeypatch.setattr(mine, "heartbeat", lambda jobs, says: set())  # it writes rq:workers, too
    client.set("rq:workers", "no set")
    await enqueued(queues, 3)
    heartbeat(mine)
    for n in range(3):
        (job,) = Ledger(client, f"dead-{n}", lease_s=0.02).claim([Ask(QUEUE, 1, 99)])
        client.hset(keys.job(job.id), "vf_attempts", 1)
        assert wait_until(lambda: not client.exists(keys.lease(QUEUE)))


@pytest.mark.parametrize(
    "failure", [RedisUnavailable("away"), ConfigError("refused"), QueueFull("full")]
)
async def test_where_leases_could_not_be_renewed_the_others_are_given_time(
    client, queues, heartbeat, monkeypatch, failure
):
    """Whatever it was: who comes back first would take over from all that come a little later."""
    monkeypatch.setattr(keys, "LEASE_TTL_S", 600.0)
    mine = Ledger(client, "w")
    beat, is_away, failed, beats = mine.heartbeat, threading.Event(), threading.Event(), []

    def heartbeat_or_fail(jobs, says):
        if is_away.is_set():
            failed.set()
            raise failure
        beats.append(1)
        return beat(jobs, says)

    monkeypatch.setattr(mine, "heartbeat", heartbeat_or_fail)
    heartbeat(mine)
    assert wait_until(lambda: beats)
    is_away.set()
    assert wait_until(failed.is_set)  # the rescue behind the last good beat is over
    await enqueued(queues, 1)
    (job,) = Ledger(client, "other").claim([Ask(QUEUE, 1, 99)])
    client.zadd(keys.lease(QUEUE), {f"{job.id}:{job.execution}": 1})  # it is over
    seen = len(beats)
    is_away.clear()
    assert wait_until(lambda: len(beats) > seen + 20)
    assert client.exists(keys.lease(QUEUE))


async def test_a_sweep_that_may_not_compare_takes_nobody_out(redis_server_factory):
    """As with an ACL of an older version."""
    server = redis_server_factory(append_only=False)
    with connect(server.url) as client:
        client.sadd(f"rq:workers:{QUEUE}", "rq:worker:other")
        client.sadd("rq:workers", "rq:worker:other")
        client.set("rq:worker:other", 1)
        client.acl_setuser("default", commands=["-sdiff"])
        with pytest.raises(VecfleetError):
            Ledger(client, "w").roster.sweep([QUEUE])
        assert client.sismember(f"rq:workers:{QUEUE}", "rq:worker:other")
