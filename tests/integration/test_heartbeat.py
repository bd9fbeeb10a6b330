"""The worker's chores on a real Redis: one that Redis refuses keeps no other waiting."""

from __future__ import annotations

import threading

from servers import wait_until

from vecfleet.common import codec, keys
from vecfleet.common.queue_client import NewJob
from vecfleet.worker.heartbeat import Counts, Heartbeat, Timing
from vecfleet.worker.ledger import Announcement, Ask, Ledger

QUEUE = keys.embed_queue("5pace", "bulk")


async def test_the_dead_are_looked_for_although_the_sweep_fails(client, queues, monkeypatch):
    """As with an ACL of an older version: it would wait a whole lease each time."""
    monkeypatch.setattr("vecfleet.worker.heartbeat._SWEEP_S", 0.0)
    client.set("rq:workers", "no set")
    for n in range(3):
        await queues.enqueue(QUEUE, [NewJob(f"j-{n}", codec.pack_call("vecfleet.embed", {}), 1)])
    mine, over = Ledger(client, "w"), threading.Event()
    heartbeat = Heartbeat(
        mine,
        queues=lambda: [QUEUE],
        announce=Announcement,
        timing=Timing(heartbeat_s=60.0, rescue_s=0.02),
        jobs=list,
        take_counts=Counts,
        on_lost=lambda lost: None,
        on_event=lambda name, count: None,
    )
    monkeypatch.setattr(mine, "heartbeat", lambda jobs, says: set())  # it writes rq:workers, too
    chores = threading.Thread(target=heartbeat.run, args=(threading.Event(), over))
    chores.start()
    try:
        for n in range(3):
            (job,) = Ledger(client, f"dead-{n}", lease_s=0.02).claim([Ask(QUEUE, 1, 99)])
            client.hset(keys.job(job.id), "vf_attempts", 1)
            assert wait_until(lambda: not client.exists(keys.lease(QUEUE)))
    finally:
        over.set()
        chores.join()
