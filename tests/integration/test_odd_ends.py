"""What is counted with nothing, abandoned, written by others, or cancelled twice; on each Redis."""

from __future__ import annotations

import threading

import pytest

from vecfleet.common import codec, keys
from vecfleet.common.admission import Admission
from vecfleet.common.dead_letter import DeadLetter
from vecfleet.common.errors import EngineFailed, JobFailed, QueueFull
from vecfleet.common.queue_client import NewJob, QueueClient, Route
from vecfleet.common.submission import Submissions
from vecfleet.worker.job import Abandoned, Answer, Commit, Failure, Settlement
from vecfleet.worker.ledger import Announcement, Ask, Ledger
from vecfleet.worker.settler import Settler

EMBED = keys.embed_queue("5pace", "interactive")
MERGE = keys.merge_queue("c0ffee" * 5 + "00")
DATA = codec.pack_call("vecfleet.embed", {"texts": ["a"]})


def claim(ledger: Ledger, queue: keys.QueueName = EMBED) -> list:
    return ledger.claim([Ask(queue, 99, 99_999)])


async def test_an_hour_of_the_dead_letter_that_holds_nothing_any_more_ends(client, asynchronous):
    queues, letter, ledger = (
        QueueClient(asynchronous),
        DeadLetter(asynchronous),
        Ledger(client, "w"),
    )
    await queues.enqueue(EMBED, [NewJob("j", DATA, 1)])
    (job,) = claim(ledger)
    ledger.settle([Settlement(job, Failure(EngineFailed("no")))])
    assert await letter.drop("j")
    (hour,) = client.zrange("vf:dead:due", 0, -1)
    client.zadd("vf:dead:due", {hour: 1})  # its time has come
    ledger.roster.sweep([EMBED])
    assert client.exists("vf:dead:due", "vf:dead:hours", "vf:dead") == 0


async def test_a_shard_of_a_deleted_collection_that_was_tried_again_is_settled(
    client, asynchronous
):
    """It counts no document, neither in the index nor as failed."""
    queues, book, ledger = QueueClient(asynchronous), Submissions(asynchronous), Ledger(client, "w")
    for name in ("first", "neighbour"):
        await book.open(name, tenant="-", collection="c", uid=MERGE.target)
        call = codec.pack_call("vecfleet.merge", {"delete": ["a"]})
        await queues.enqueue(MERGE, [NewJob(f"{name}-0", call, 1, 0, 0)], Route(submission=name))
        await book.close(name, blocks=1, documents=0)
    first, neighbour = claim(ledger, MERGE)
    ledger.settle([Settlement(first, Failure(JobFailed("cannot be merged")))])
    ledger.release([neighbour])
    # As people try it again, and the collection goes meanwhile.
    client.zrem(f"rq:failed:{MERGE}", "first-0")
    client.hset(keys.job("first-0"), mapping={"status": "queued", "vf_attempts": 0})
    client.lpush(keys.queue_list(MERGE), "first-0")
    jobs = claim(ledger, MERGE)
    assert [job.id for job in jobs] == ["first-0", "neighbour-0"]
    nothing = Commit(0, {"version": 0, "documents": 0})
    assert ledger.settle([Settlement(job, nothing) for job in jobs]) == [True, True]
    for name in ("first", "neighbour"):
        found = await book.get(name)
        assert (found.state, found.failed) == ("done", 0)


async def test_one_that_cannot_be_settled_costs_the_others_nothing(client, asynchronous):
    await QueueClient(asynchronous).enqueue(EMBED, [NewJob(f"j{n}", DATA, 1) for n in range(3)])
    jobs = claim(Ledger(client, "w"))

    class Broken(Ledger):
        def settle(self, settlements):
            if any(settlement.job.id == "j1" for settlement in settlements):
                raise RuntimeError("nobody foresaw it")
            return super().settle(settlements)

    told = {}
    settler = Settler(
        Broken(client, "w"),
        lambda batch, settled: told.update(zip((s.job.id for s in batch), settled, strict=True)),
        threading.Event(),
    )
    for job in jobs:
        settler.put(Settlement(job, Answer({})))
    settler.close()
    settler.run()
    assert told == {"j0": True, "j1": False, "j2": True}


async def test_a_heartbeat_does_not_renew_what_was_abandoned(client, asynchronous):
    await QueueClient(asynchronous).enqueue(EMBED, [NewJob("j", DATA, 1)])
    ledger = Ledger(client, "w")
    (job,) = claim(ledger)
    assert ledger.settle([Settlement(job, Abandoned())]) == [True]
    assert ledger.heartbeat([job], Announcement()) == {job.execution}
    assert ledger.rescue([EMBED]) == (1, 0)


async def test_a_release_does_not_undo_an_abandonment(client, asynchronous):
    """Whose reply was lost, say: what the worker still has it releases when it ends."""
    await QueueClient(asynchronous).enqueue(EMBED, [NewJob(f"j{n}", DATA, 1) for n in range(2)])
    ledger = Ledger(client, "w")
    died, other = claim(ledger)
    assert ledger.settle([Settlement(died, Abandoned())]) == [True]
    assert ledger.release([died, other]) == 1
    assert ledger.rescue([EMBED]) == (1, 0)
    charged = [client.hget(keys.job(job.id), "vf_attempts") for job in (died, other)]
    assert charged == [b"1", b"0"]


async def test_a_lease_that_names_no_job_does_not_stop_the_rescue(client, asynchronous):
    await QueueClient(asynchronous).enqueue(EMBED, [NewJob("j", DATA, 1)])
    dying = Ledger(client, "dying")
    (job,) = claim(dying)
    client.zadd(keys.lease(EMBED), {"nobody": 0, f"{job.id}:{job.execution}": 1})
    assert Ledger(client, "other").rescue([EMBED]) == (1, 0)
    assert client.zcard(keys.lease(EMBED)) == 0


async def test_who_cancels_twice_forgets_no_suspect(client, asynchronous):
    queues = QueueClient(asynchronous)
    await queues.enqueue(EMBED, [NewJob("j", DATA, 1)], Route(box="b", deadline_ms=60_000))
    (job,) = claim(Ledger(client, "dying"))
    assert await queues.cancel(["j"]) == 1
    assert await queues.cancel(["j"]) == 1
    assert client.zscore(keys.lease(EMBED), f"{job.id}:{job.execution}")
    assert client.hget(keys.job("j"), "status") == b"started"


async def test_a_job_without_an_origin_can_be_cancelled(client, asynchronous):
    client.hset(keys.job("odd"), mapping={"status": "queued", "data": DATA})
    assert await QueueClient(asynchronous).cancel(["odd"]) == 1
    assert not client.exists(keys.job("odd"))


async def test_one_tenants_dead_letter_does_not_keep_another_one_out(client, asynchronous):
    queues = QueueClient(asynchronous, Admission(max_dead_bytes=100_000))
    ledger = Ledger(client, "w")

    async def put(tenant: str, sub: str, count: int) -> None:
        queue = keys.embed_queue("5pace", "bulk", tenant)
        blocks = [NewJob(f"{sub}-{n}", b"x" * 2700, 1, n, 1) for n in range(count)]
        await queues.enqueue(queue, blocks, Route(submission=sub))

    def fail(tenant: str) -> None:
        queue = keys.embed_queue("5pace", "bulk", tenant)
        ledger.settle(
            [Settlement(job, Failure(EngineFailed("no"))) for job in claim(ledger, queue)]
        )

    await put("good", "g1", 1)
    fail("good")
    await put("evil", "e1", 22)  # all at once, when there was nothing yet
    fail("evil")
    assert int(client.hget(keys.DEAD_BYTES, "*")) > 100_000
    with pytest.raises(QueueFull, match="dead letter"):
        await put("evil", "e2", 1)
    await put("good", "g2", 1)
    await put("evil", "e1", 22)  # what is known already is told so


async def test_cancelled_ids_do_not_pile_up_where_nobody_claims(client, asynchronous):
    queues = QueueClient(asynchronous)
    waits = Route(box="b", deadline_ms=60_000)
    for first in range(0, 500, 50):
        names = [f"j{n}" for n in range(first, first + 50)]
        await queues.enqueue(EMBED, [NewJob(name, DATA, 1) for name in names], waits)
        assert await queues.cancel(names) == 50
    assert client.llen(keys.queue_list(EMBED)) < 50
    await queues.enqueue(EMBED, [NewJob("stays", DATA, 1), NewJob("goes", DATA, 1)], waits)
    assert await queues.cancel(["goes"]) == 1
    assert [job.id for job in claim(Ledger(client, "w"))] == ["stays"]


async def test_an_id_in_the_dead_letter_that_is_no_text_is_passed_over(client, asynchronous):
    client.sadd(keys.QUEUES, keys.queue_list(EMBED))
    client.zadd(f"rq:failed:{EMBED}", {b"\xff\xfe": 1 << 40})
    assert (await DeadLetter(asynchronous).page()).entries == ()
