"""The dead letter on a real Redis: what it shows, and that an entry is taken out once."""

from __future__ import annotations

import asyncio
import base64

import pytest
from rq.registry import FailedJobRegistry
from servers import eventually

from vecfleet.common import codec, keys, payloads
from vecfleet.common.admission import Admission
from vecfleet.common.codec import Serializer
from vecfleet.common.collection import Collection, CollectionSpec
from vecfleet.common.dead_letter import DeadLetter
from vecfleet.common.dead_walk import DeadFilter, parse_since
from vecfleet.common.errors import (
    Conflict,
    EmptyText,
    EngineFailed,
    InvalidInput,
    JobCancelled,
    PoisonText,
    QueueFull,
    TextTooLong,
    UnknownCollection,
    UnknownEntry,
)
from vecfleet.common.fleet_state import read_fleet_state
from vecfleet.common.queue_client import NewJob, QueueClient, Route
from vecfleet.common.redis_client import read_lua
from vecfleet.common.submission import Submissions
from vecfleet.fleet.cli import run
from vecfleet.worker import ledger as ledger_module
from vecfleet.worker.job import Commit, Failure, HandOn, Refused, Settlement
from vecfleet.worker.ledger import Ask, Ledger

UID = "c0ffee"
ODD_CURSORS = [
    b'[NaN,"x"]',
    b'[Infinity,"x"]',
    b'[1e999,"x"]',
    b"[" + b"9" * 400 + b',"x"]',
    b"[" + b"9" * 5000 + b',"x"]',
    b'["1","x"]',
    b'[null,"x"]',
    b"[1,2]",
    b'[1,"x",3]',
    b"[" * 100_000,
    b"7",
    b"\xff",
]
QUEUE = keys.embed_queue("5pace", "bulk")
THEIRS = keys.embed_queue("5pace", "bulk", "acme")
MERGE = keys.merge_queue(UID)
MERGED = codec.pack_call(payloads.MERGE, b"shard")


@pytest.fixture
def fleet(client, asynchronous):
    return Fleet(client, asynchronous)


class Fleet:
    """A submission of blocks, a worker that refuses what it is told to, and the dead letter."""

    def __init__(self, client, connection) -> None:
        self.client = client
        self.connection = connection
        self.queues = QueueClient(connection)
        self.submissions = Submissions(connection)
        self.letter = DeadLetter(connection)
        self.ledger = Ledger(client, "w1")

    async def enqueue(self, sub, place, count, queue=QUEUE):
        await self.submissions.open(sub, tenant="-", collection="c", uid=UID)
        ids = [f"{sub}-{place}-{n}" for n in range(count)]
        data = codec.pack_call(payloads.EMBED, {"ids": ids, "texts": [f"text {i}" for i in ids]})
        job = NewJob(f"{sub}-{place}", data, 10 * count, place, count)
        route = Route(submission=sub, merge_queue=str(MERGE), version_uid=UID)
        return (await self.queues.enqueue(queue, [job], route)).numbers[0]

    def refuse(self, bad, error=None, queue=QUEUE):
        """Embed the next job but for the texts at ``bad``."""
        (job,) = self.ledger.claim([Ask(queue, 1, 9999)])
        payload = job.payload
        refused = []
        for place in bad:
            alone = {"ids": [payload["ids"][place]], "texts": [payload["texts"][place]]}
            data = codec.pack_call(payloads.EMBED, alone)
            why = error or EngineFailed("no", field="text")
            refused.append(Refused(place, payload["ids"][place], why, data, 7))
        left = job.documents - len(refused)
        outcome = HandOn(str(MERGE), MERGED, left, refused) if left else Commit(0, {}, refused)
        assert self.ledger.settle([Settlement(job, outcome)]) == [True]

    def merge(self):
        (job,) = self.ledger.claim([Ask(MERGE, 1, 9999)])
        assert self.ledger.settle([Settlement(job, Commit(job.documents, {}))]) == [True]
        return job

    def fail(self, queue=QUEUE, error=None):
        (job,) = self.ledger.claim([Ask(queue, 1, 9999)])
        failure = Failure(error or InvalidInput("no", field="ids"))
        assert self.ledger.settle([Settlement(job, failure)]) == [True]
        return job


async def test_an_entry_tells_all_about_its_document(fleet):
    version = await fleet.enqueue("s", 3, 5)
    fleet.refuse([1, 4])
    page = await fleet.letter.page()
    assert (page.cursor, [e.id for e in page.entries]) == ("", ["s-3-refused-4", "s-3-refused-1"])
    entry = page.entries[1]
    assert (entry.uid, entry.task, entry.tenant, entry.submission) == (UID, "embed", "-", "s")
    assert (entry.code, entry.message) == ("engine_failed", "no")
    assert (entry.attempts, entry.worker, entry.version, entry.count) == (1, "w1", version, 1)
    assert [(d.id, d.text) for d in entry.documents] == [("s-3-1", "text s-3-1")]
    seconds, _ = fleet.client.time()
    assert abs(entry.died_ms / 1000 - seconds) < 60
    assert await fleet.letter.get(entry.id) == entry
    registry = FailedJobRegistry(str(QUEUE), connection=fleet.client, serializer=Serializer)
    assert set(registry.get_job_ids()) == {e.id for e in page.entries}


async def test_a_whole_block_is_an_entry_with_all_its_texts(fleet):
    await fleet.enqueue("s", 0, 3)
    fleet.fail()
    (entry,) = (await fleet.letter.page()).entries
    assert (entry.id, entry.code, entry.count) == ("s-0", "invalid_input", 3)
    assert [d.text for d in entry.documents] == ["text s-0-0", "text s-0-1", "text s-0-2"]


async def test_pages_hold_each_entry_once_the_newest_first(fleet):
    for block in range(7):
        await fleet.enqueue("s", block, 40, THEIRS if block % 2 else QUEUE)
        fleet.refuse(range(30), queue=THEIRS if block % 2 else QUEUE)
    seen, cursor = [], ""
    while True:
        page = await fleet.letter.page(cursor=cursor, limit=16)
        seen += page.entries
        cursor = page.cursor
        if not cursor:
            break
    assert len({e.id for e in seen}) == len(seen) == 210
    theirs = await fleet.letter.page(DeadFilter(tenant="acme"), limit=100)
    assert {e.tenant for e in theirs.entries} == {"acme"}
    assert len(theirs.entries) == 90


@pytest.mark.parametrize("together", [1, 3, 100])
async def test_pages_hold_each_entry_once_whenever_it_died(fleet, together):
    """Of so many the score is the same, as of what RQ's own tools put there."""
    for block in range(4):
        await fleet.enqueue("s", block, 60, THEIRS if block % 2 else QUEUE)
        fleet.refuse(range(60), queue=THEIRS if block % 2 else QUEUE)
    for queue in (QUEUE, THEIRS):
        for n, entry in enumerate(fleet.client.zrange(keys.dead(queue), 0, -1)):
            fleet.client.zadd(keys.dead(queue), {entry: 2_000_000_000 + n // together})
    for limit, tenant, count in ((100, None, 240), (7, None, 240), (100, "acme", 120)):
        seen, cursor = [], ""
        while True:
            wanted = DeadFilter(tenant)
            page = await fleet.letter.page(wanted, cursor=cursor, limit=limit, texts=False)
            seen += [entry.id for entry in page.entries]
            cursor = page.cursor
            if not cursor:
                break
        assert len(set(seen)) == len(seen) == count


async def test_pages_of_what_died_at_once_are_read_once(fleet):
    """Among entries of one score, each page would begin with the first again."""
    blocks, size, limit = 8, 60, 20
    for block in range(blocks):
        await fleet.enqueue("s", block, size)
        fleet.refuse(range(size))
    scores = dict(fleet.client.zrange(keys.dead(QUEUE), 0, -1, withscores=True))
    assert len(set(scores.values())) == blocks * size
    fleet.client.config_resetstat()
    pages, cursor = 0, ""
    while pages == 0 or cursor:
        cursor = (await fleet.letter.page(cursor=cursor, limit=limit, texts=False)).cursor
        pages += 1
    assert pages >= blocks * size / limit
    asked = fleet.client.info("commandstats")["cmdstat_zrevrangebyscore"]["calls"]
    assert asked <= 2 * pages
    died_ms = int(fleet.client.hget(keys.job("s-0-refused-0"), "vf_died"))
    over_s = died_ms / 1000 + keys.DEAD_TTL_S
    assert abs(scores[b"s-0-refused-0"] - over_s) < 0.01, "when it is forgotten"


async def test_filters(fleet):
    await fleet.enqueue("s", 0, 4)
    fleet.refuse([0, 1], PoisonText(field="text"))
    await fleet.enqueue("s", 1, 4)
    fleet.refuse([2])

    async def ids(**wanted):
        return {e.id for e in (await fleet.letter.page(DeadFilter(**wanted))).entries}

    assert await ids(code="poison_text") == {"s-0-refused-0", "s-0-refused-1"}
    assert await ids(uid="other") == set()
    assert len(await ids(uid=UID)) == 3
    assert len(await ids(since_ms=1)) == 3
    assert await ids(since_ms=1 << 50) == set()
    with pytest.raises(InvalidInput):
        await fleet.letter.page(cursor="!")
    for told in ODD_CURSORS:
        with pytest.raises(InvalidInput) as refused:
            await fleet.letter.page(cursor=base64.urlsafe_b64encode(told).decode().rstrip("="))
        assert refused.value.field == "cursor"
    with pytest.raises(InvalidInput):
        await fleet.letter.page(limit=101)


async def test_a_retry_keeps_the_version_and_is_counted_once(fleet):
    version = await fleet.enqueue("s", 0, 4)
    await fleet.submissions.close("s", blocks=1, documents=4)
    fleet.refuse([2])
    fleet.merge()
    state = await fleet.submissions.get("s")
    assert (state.state, state.committed, state.failed) == ("done", 3, 1)
    await fleet.letter.retry("s-0-refused-2")
    assert (await fleet.letter.page()).entries == ()
    assert fleet.client.zcard(keys.dead(QUEUE)) == 0
    assert fleet.client.ttl(keys.job("s-0-refused-2")) == -1  # it may wait as long as it takes
    assert fleet.client.hget(keys.load(QUEUE), "tokens") == b"7"
    (job,) = fleet.ledger.claim([Ask(QUEUE, 1, 9999)])
    assert (job.version, job.is_apart, job.attempts, job.documents) == (version, True, 1, 1)
    assert fleet.ledger.settle([Settlement(job, HandOn(str(MERGE), MERGED, 1))]) == [True]
    assert fleet.merge().version == version
    state = await fleet.submissions.get("s")
    assert (state.state, state.committed, state.failed) == ("done", 4, 0)
    assert fleet.client.zcard(keys.outstanding(UID)) == 0
    assert fleet.client.keys("rq:job:*") == []


async def test_a_retry_that_overtakes_its_block_is_counted_right(fleet):
    await fleet.enqueue("s", 0, 4)
    fleet.refuse([2])
    (block,) = fleet.ledger.claim([Ask(MERGE, 1, 9999)])
    await fleet.letter.retry("s-0-refused-2")
    (late,) = fleet.ledger.claim([Ask(QUEUE, 1, 9999)])
    fleet.ledger.settle([Settlement(late, HandOn(str(MERGE), MERGED, 1))])
    fleet.merge()
    assert (await fleet.submissions.get("s")).failed == 0
    fleet.ledger.settle([Settlement(block, Commit(block.documents, {}))])
    state = await fleet.submissions.get("s")
    assert (state.committed, state.failed) == (4, 0)


async def test_a_whole_block_that_is_tried_again_counts_once(fleet):
    await fleet.enqueue("s", 0, 3)
    await fleet.submissions.close("s", blocks=1, documents=3)
    fleet.fail()
    assert (await fleet.submissions.get("s")).failed == 3
    await fleet.letter.retry("s-0")
    fleet.refuse([])
    fleet.merge()
    state = await fleet.submissions.get("s")
    assert (state.committed, state.failed) == (3, 0)


async def test_what_fails_again_is_the_same_entry(fleet):
    await fleet.enqueue("s", 0, 2)
    fleet.refuse([1])
    await fleet.letter.retry("s-0-refused-1")
    fleet.fail(error=EngineFailed("still no"))
    (entry,) = (await fleet.letter.page()).entries
    assert (entry.id, entry.message, entry.submission) == ("s-0-refused-1", "still no", "s")


async def test_a_retry_with_another_text(fleet):
    await fleet.enqueue("s", 0, 2)
    fleet.refuse([1], PoisonText())
    for bad, error in (("", EmptyText), ("x" * 300_000, TextTooLong), ("\ud800", InvalidInput)):
        with pytest.raises(error):
            await fleet.letter.retry("s-0-refused-1", text=bad)
    with pytest.raises(InvalidInput, match="no document"):
        await fleet.letter.retry("s-0-refused-1", text="good", document="other")
    assert len((await fleet.letter.page()).entries) == 1
    await fleet.letter.retry("s-0-refused-1", text="a better text")
    (job,) = fleet.ledger.claim([Ask(QUEUE, 1, 9999)])
    assert job.payload == {"ids": ["s-0-1"], "texts": ["a better text"]}
    assert not job.is_suspect


async def test_in_a_block_the_document_is_named(fleet):
    await fleet.enqueue("s", 0, 3)
    fleet.fail()
    with pytest.raises(InvalidInput, match="3 documents"):
        await fleet.letter.retry("s-0", text="better")
    await fleet.letter.retry("s-0", text="better", document="s-0-1")
    (job,) = fleet.ledger.claim([Ask(QUEUE, 1, 9999)])
    assert job.payload["texts"] == ["text s-0-0", "better", "text s-0-2"]


async def test_what_killed_stays_a_suspect(fleet):
    await fleet.enqueue("s", 0, 2)
    fleet.refuse([1], PoisonText())
    await fleet.letter.retry("s-0-refused-1")
    (job,) = fleet.ledger.claim([Ask(QUEUE, 1, 9999)])
    assert job.is_suspect


async def test_of_two_who_retry_one_wins_and_the_other_is_told(fleet):
    await fleet.enqueue("s", 0, 1)
    fleet.refuse([0])
    for _ in range(20):
        told = await asyncio.gather(
            *(fleet.letter.retry("s-0-refused-0") for _ in range(5)),
            *(fleet.letter.drop("none") for _ in range(2)),
            return_exceptions=True,
        )
        kinds = [type(one).__name__ for one in told]
        assert kinds.count("DeadEntry") == 1
        assert set(kinds) <= {"DeadEntry", "Conflict", "UnknownEntry"}
        assert fleet.client.llen(keys.queue_list(QUEUE)) == 1
        fleet.fail(error=EngineFailed("again"))


async def test_an_entry_that_changed_since_it_was_read_is_left_alone(fleet):
    await fleet.enqueue("s", 0, 1)
    fleet.refuse([0])
    entry = await fleet.letter.get("s-0-refused-0")
    await fleet.letter.retry(entry.id)
    fleet.client.eval("return redis.call('TIME')", 0)
    fleet.fail(error=EngineFailed("again"))
    fleet.client.hset(keys.job(entry.id), "vf_died", entry.died_ms + 5)
    with pytest.raises(Conflict):
        await fleet.letter._take_out("drop", entry)
    assert len((await fleet.letter.page()).entries) == 1


async def test_dropping(fleet):
    await fleet.enqueue("s", 0, 2)
    fleet.refuse([0])
    assert fleet.client.zcard(keys.outstanding(UID)) == 2
    await fleet.letter.drop("s-0-refused-0")
    assert fleet.client.keys("*refused*") == []
    assert fleet.client.zrange(keys.outstanding(UID), 0, -1) == [b"s-0"]
    with pytest.raises(UnknownEntry):
        await fleet.letter.drop("s-0-refused-0")


async def test_tenants_do_not_reach_each_others_entries(fleet):
    await fleet.enqueue("s", 0, 1, THEIRS)
    fleet.refuse([0], queue=THEIRS)
    for call in (
        fleet.letter.get("s-0-refused-0", "-"),
        fleet.letter.retry("s-0-refused-0", tenant="-"),
    ):
        with pytest.raises(UnknownEntry):
            await call
    assert (await fleet.letter.get("s-0-refused-0", "acme")).tenant == "acme"


@pytest.mark.parametrize("name", ["", "x", "s-0", "a" * 300, "../../etc", "\0", "rq:queues", "ü"])
async def test_what_is_no_entry_is_not_found(fleet, name):
    await fleet.enqueue("s", 0, 1)  # it waits: it is not dead
    for call in (fleet.letter.get(name), fleet.letter.retry(name), fleet.letter.drop(name)):
        with pytest.raises(UnknownEntry):
            await call


async def test_a_cancelled_submissions_block_is_not_tried_again(fleet):
    await fleet.enqueue("s", 0, 1)
    fleet.fail()
    await fleet.submissions.cancel("s")
    with pytest.raises(JobCancelled):
        await fleet.letter.retry("s-0")


async def test_a_retry_waits_for_room(fleet):
    await fleet.enqueue("s", 0, 1)
    fleet.fail()
    await fleet.enqueue("s", 1, 1)
    small = DeadLetter(fleet.letter._redis, Admission(max_tokens=15))
    with pytest.raises(QueueFull):
        await small.retry("s-0")
    assert len((await fleet.letter.page()).entries) == 1


async def test_the_dead_letter_forgets_after_its_time(client, fleet, caplog):
    fleet.ledger = Ledger(client, "w1", dead_ttl_s=100)
    await fleet.enqueue("s", 0, 2)
    fleet.refuse([0])
    key = keys.job("s-0-refused-0")
    assert 0 < client.ttl(key) <= 100
    client.delete(key)  # as when its time has come
    assert (await fleet.letter.page()).entries == ()
    client.zadd(keys.dead(QUEUE), {"s-0-refused-0": 1})
    client.sadd(keys.QUEUES, keys.queue_list(QUEUE))
    await fleet.enqueue("s", 1, 2)
    fleet.refuse([1])
    (load,) = [
        q for q in (await read_fleet_state(fleet.connection)).queues if q.queue == str(QUEUE)
    ]
    assert load.dead == 1  # not what is over
    with caplog.at_level("WARNING"):
        fleet.ledger.roster.sweep([QUEUE])
    assert client.zrange(keys.dead(QUEUE), 0, -1) == [b"s-1-refused-1"]
    assert "1 entries of the dead letter" in caplog.text


async def test_the_watermark_waits_for_what_is_dead(fleet):
    first = await fleet.enqueue("s", 0, 2)
    await fleet.enqueue("s", 1, 2)
    fleet.refuse([0])
    fleet.refuse([])
    fleet.merge()
    fleet.merge()
    script = fleet.client.register_script(read_lua(ledger_module._FOLDER, "watermark"))
    names = [keys.outstanding(UID), keys.version(UID)]
    assert script(keys=names, args=[100]) == first
    await fleet.letter.retry("s-0-refused-0")
    assert script(keys=names, args=[100]) == first
    (job,) = fleet.ledger.claim([Ask(QUEUE, 1, 9999)])
    fleet.ledger.settle([Settlement(job, HandOn(str(MERGE), MERGED, 1))])
    assert script(keys=names, args=[100]) == first
    fleet.merge()
    assert script(keys=names, args=[100]) > first


@pytest.mark.parametrize("whole", [True, False])
async def test_rqs_own_requeue_still_does_the_right_thing(fleet, whole):
    version = await fleet.enqueue("s", 0, 3)
    await fleet.submissions.close("s", blocks=1, documents=3)
    if whole:
        fleet.fail()
    else:
        fleet.refuse([1])
        fleet.merge()
    (entry,) = (await fleet.letter.page()).entries
    registry = FailedJobRegistry(str(QUEUE), connection=fleet.client, serializer=Serializer)
    registry.requeue(entry.id)
    assert (await fleet.letter.page()).entries == ()
    (job,) = fleet.ledger.claim([Ask(QUEUE, 1, 9999)])
    assert (job.error, job.version) == (None, version)
    fleet.ledger.settle([Settlement(job, HandOn(str(MERGE), MERGED, job.documents))])
    fleet.merge()
    state = await fleet.submissions.get("s")
    assert (state.state, state.committed, state.failed) == ("done", 3, 0)


def held(client) -> dict[bytes, int]:
    return {tenant: int(size) for tenant, size in client.hgetall(keys.DEAD_BYTES).items()}


async def test_what_the_dead_letter_holds_is_counted(client, fleet):
    await fleet.enqueue("s", 0, 4, THEIRS)
    fleet.refuse([0, 1, 2], queue=THEIRS)
    await fleet.enqueue("s", 1, 2)
    fleet.fail()
    sizes = [client.hstrlen(keys.job(f"s-0-refused-{n}"), "data") for n in range(3)]
    theirs, ours = sum(sizes) + 3 * 2200, client.hstrlen(keys.job("s-1"), "data") + 2200
    assert held(client) == {b"acme": theirs, b"-": ours, b"*": theirs + ours}
    assert (await read_fleet_state(fleet.connection)).dead_bytes == {"acme": theirs, "-": ours}
    await fleet.letter.drop("s-0-refused-0")
    await fleet.letter.retry("s-0-refused-1", text="a longer text " * 20)
    assert held(client) == {b"acme": sizes[2] + 2200, b"-": ours, b"*": sizes[2] + 2200 + ours}
    await fleet.letter.retry("s-1")
    registry = FailedJobRegistry(str(THEIRS), connection=client, serializer=Serializer)
    registry.requeue("s-0-refused-2")
    fleet.ledger.claim([Ask(THEIRS, 1, 9999)])  # the one that was tried again
    assert held(client) == {b"acme": sizes[2] + 2200, b"*": sizes[2] + 2200}
    Ledger(client, "w2").claim([Ask(THEIRS, 1, 9999)])  # the one that RQ's tools took out
    assert held(client) == {}


async def test_what_is_over_is_counted_no_more(client, fleet):
    await fleet.enqueue("s", 0, 2)
    fleet.refuse([0])
    ((hour, size),) = client.hgetall("vf:dead:hours").items()
    client.rename("vf:dead:hours", "old")
    client.hset("vf:dead:hours", b"5:-", size)
    client.zadd("vf:dead:due", {b"5:-": 5})
    client.zrem("vf:dead:due", hour)
    fleet.ledger.roster.sweep([QUEUE])
    assert held(client) == client.hgetall("vf:dead:hours") == {}
    await fleet.letter.drop("s-0-refused-0")
    assert held(client) == {}


async def test_a_tenant_that_fills_the_dead_letter_is_told_to_look_at_it(client, fleet):
    for block in range(2):
        await fleet.enqueue("s", block, 4, THEIRS)
        fleet.refuse([0, 1, 2, 3], queue=THEIRS)
    await fleet.enqueue("s", 2, 1)
    fleet.fail()  # of another tenant, which holds little
    full = sum(size for tenant, size in held(client).items() if tenant != b"*")
    queues = QueueClient(fleet.connection, Admission(max_dead_bytes=full + 5000))
    data = codec.pack_call(payloads.EMBED, {"ids": ["a"], "texts": ["a"]})
    bulk = Route(submission="s", merge_queue=str(MERGE))
    with pytest.raises(QueueFull, match="dead letter"):
        await queues.enqueue(THEIRS, [NewJob("new", data, 1, 8)], bulk)
    assert not client.exists(keys.job("new"))
    await queues.enqueue(QUEUE, [NewJob("ours", data, 1, 9)], bulk)
    calls = keys.embed_queue("5pace", "interactive", "acme")
    await queues.enqueue(calls, [NewJob("call", data, 1)], Route(box="b"))
    await queues.enqueue(keys.merge_queue(UID, "acme"), [NewJob("delete", data, 1)])
    for block, place in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)):
        await fleet.letter.drop(f"s-{block}-refused-{place}")
    await queues.enqueue(THEIRS, [NewJob("new", data, 1, 10)], bulk)


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"max_bytes": 10}, "queue that the entry"),
        ({"max_shared_bytes": 10}, "all tenants"),
        ({"max_merge_bytes": 10}, "merged"),
        ({"max_unmerged_bytes": 10}, "merged"),
    ],
)
async def test_a_retry_has_the_limits_of_an_enqueue(client, fleet, limits, why):
    await fleet.enqueue("s", 0, 1)
    fleet.fail()
    await fleet.enqueue("s", 1, 1)
    fleet.refuse([])  # waits to be merged
    await fleet.enqueue("s", 2, 1)
    before = {key: client.dump(key) for key in client.keys("*")}
    small = DeadLetter(fleet.connection, Admission(**limits))
    with pytest.raises(QueueFull, match=why):
        await small.retry("s-0")
    assert {key: client.dump(key) for key in client.keys("*")} == before
    await fleet.letter.retry("s-0")


async def test_a_full_redis_takes_no_retry_but_lets_entries_go(client, fleet):
    await fleet.enqueue("s", 0, 2)
    fleet.refuse([0, 1])
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)
    before = {key: client.dump(key) for key in client.keys("*")}
    for text in (None, "another text"):
        with pytest.raises(QueueFull):
            await fleet.letter.retry("s-0-refused-0", text=text)
    assert {key: client.dump(key) for key in client.keys("*")} == before
    for place in (0, 1):
        await fleet.letter.drop(f"s-0-refused-{place}")
    assert (await fleet.letter.page()).entries == ()
    assert held(client) == {}


async def test_what_has_no_collection_any_more_is_not_tried_again(client, fleet):
    await fleet.enqueue("s", 0, 1)
    fleet.fail()
    client.set(keys.PUBLISHED, "1")
    with pytest.raises(UnknownCollection, match="deleted"):
        await fleet.letter.retry("s-0")
    assert len((await fleet.letter.page()).entries) == 1
    record = Collection("c", UID, CollectionSpec("m", "5pace", 8)).to_wire()
    client.hset(keys.collections("-"), "c", codec.dumps(record))
    await DeadLetter(fleet.connection).retry("s-0")


async def test_many_are_tried_again_as_far_as_there_is_room(fleet):
    await fleet.enqueue("s", 0, 5)
    fleet.refuse(range(5))
    small = DeadLetter(fleet.connection, Admission(max_tokens=14))  # two of them
    first = await small.each("retry", DeadFilter())
    assert first.done == ("s-0-refused-4", "s-0-refused-3")
    with pytest.raises(QueueFull):
        await small.each("retry", DeadFilter(), cursor=first.cursor)
    while fleet.ledger.claim([Ask(QUEUE, 9, 9999)]):
        pass
    second = await small.each("retry", DeadFilter(), cursor=first.cursor)
    assert second.done == ("s-0-refused-2", "s-0-refused-1")
    await fleet.enqueue("gone", 1, 1)
    fleet.ledger.claim([Ask(QUEUE, 9, 9999)])
    last = await fleet.letter.each("drop", DeadFilter(), cursor=second.cursor)
    assert (last.done, last.failed, last.cursor) == (("s-0-refused-0",), {}, "")


async def test_what_cannot_be_tried_again_does_not_hold_up_the_rest(fleet):
    for name in ("a", "b", "c"):
        await fleet.enqueue(name, 0, 1)
        fleet.fail()
    await fleet.submissions.cancel("b")
    swept = await fleet.letter.each("retry", DeadFilter(), limit=2)
    assert swept.done == ("c-0",)
    assert isinstance(swept.failed["b-0"], JobCancelled)
    assert (await fleet.letter.each("retry", DeadFilter(), cursor=swept.cursor)).done == ("a-0",)


async def test_a_page_reads_a_bounded_part(fleet, monkeypatch):
    await fleet.enqueue("s", 0, 5)
    fleet.refuse(range(5))
    size = fleet.client.hstrlen(keys.job("s-0-refused-0"), "data")
    monkeypatch.setattr("vecfleet.common.dead_letter._PAGE_BYTES", 3 * size + 1)
    entries = (await fleet.letter.page()).entries
    assert [len(entry.documents) for entry in entries] == [1, 1, 1, 0, 0]
    bare = (await fleet.letter.page(texts=False)).entries
    assert [entry.documents for entry in bare] == [()] * 5
    assert (await fleet.letter.get("s-0-refused-0")).documents[0].text == "text s-0-0"


async def test_the_command_waits_for_room(client, fleet, monkeypatch, capsys):
    monkeypatch.setenv("VECFLEET_MAX_QUEUE_TOKENS", "8")
    monkeypatch.setattr("vecfleet.fleet.dead_command._RETRY_S", 0.05)
    await fleet.enqueue("s", 0, 3)
    fleet.refuse(range(3))
    command = ["dead", "retry", "--all", "--redis", client.url]
    waiting = asyncio.create_task(asyncio.to_thread(run, command))
    await eventually(lambda: client.hget(keys.load(QUEUE), "jobs") == b"1")
    claimed = 0
    while claimed < 3:
        claimed += len(await asyncio.to_thread(fleet.ledger.claim, [Ask(QUEUE, 1, 9999)]))
    assert (await waiting, capsys.readouterr().out) == (0, "queued again: 3\n")

    await fleet.enqueue("t", 0, 3)
    fleet.refuse(range(3))
    monkeypatch.setattr("vecfleet.fleet.dead_command._PATIENCE_S", 0.2)
    assert await asyncio.to_thread(run, command) == 3
    assert capsys.readouterr().out == "queued again: 1\n"


def test_moments():
    assert parse_since("1700000000") == 1_700_000_000_000
    assert parse_since("2023-11-14T22:13:20+00:00") == 1_700_000_000_000
    assert parse_since("2023-11-14T22:13:20") == 1_700_000_000_000
    assert parse_since("2h") < parse_since("1h")
    for bad in ("", "yesterday", "5x", "9" * 40, "-1", "99999999999999d"):
        with pytest.raises(InvalidInput):
            parse_since(bad)
