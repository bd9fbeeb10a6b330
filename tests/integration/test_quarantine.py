"""What rescue.lua makes of suspects, and how a suspect runs alone, on a real Redis."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from servers import eventually, wait_until

from vecfleet.common import codec, keys
from vecfleet.common.errors import (
    EngineFailed,
    JobCancelled,
    PoisonText,
    TextsTooLong,
    Unavailable,
)
from vecfleet.common.hashing import text_key
from vecfleet.common.payloads import computed_together
from vecfleet.common.queue_client import NewJob, QueueClient, Route
from vecfleet.common.redis_client import connect_async
from vecfleet.worker.job import Answer, ClaimedJob, Settlement
from vecfleet.worker.ledger import KNOWN_TEXTS, MAX_CONDEMNED, Announcement, Ask, Ledger
from vecfleet.worker.poison import PoisonTexts
from vecfleet.worker.quarantine import Quarantine, raise_errors
from vecfleet.worker.window import Window

QUEUE = keys.embed_queue("5pace", "bulk")
FAST = keys.embed_queue("5pace", "interactive")


async def enqueue(client, *names: str, queue=QUEUE, route=None):
    async with connect_async(client.url) as connection:
        jobs = [NewJob(name, codec.pack_call("vecfleet.embed", {}), 10) for name in names]
        await QueueClient(connection).enqueue(queue, jobs, route)


class Deaths:
    """Claims jobs, notes places and dies, again and again."""

    def __init__(self, client) -> None:
        self.client = client
        self.dying = Ledger(client, "dying", lease_s=0.01)
        self.other = Ledger(client, "other")

    def die(self, *at: int | str | None, most: int = 9) -> tuple[int, int]:
        """Claim, work up to the last of ``at``, die; what the rescue made of it."""
        jobs = Ledger(self.client, "dying", lease_s=5).claim([Ask(QUEUE, most, 999)])
        for place in at:
            if place != "*":
                self.other.mark(jobs[0], place)
        for job in jobs:
            self.client.zadd(keys.lease(QUEUE), {f"{job.id}:{job.execution}": 1})
        return wait_until(lambda: sum(found := self.other.rescue([QUEUE])) and found)

    def fields(self, job: str = "j"):
        found = self.client.hmget(keys.job(job), "vf_attempts", "vf_named", "vf_condemned", "vf_at")
        return [value and value.decode() for value in found]


async def test_the_second_death_names_a_text_and_the_third_condemns_it(client):
    deaths = Deaths(client)
    await enqueue(client, "j")
    assert deaths.die() == (1, 0)
    assert deaths.fields() == ["1", None, None, None]
    assert deaths.die(0, 1, 2) == (1, 0)
    assert deaths.fields() == ["2", "2", None, None]
    (job,) = deaths.other.claim([Ask(QUEUE, 9, 999)])
    assert (job.named, job.condemned, job.is_suspect) == (2, (), True)
    assert deaths.other.release([job]) == 1
    assert deaths.die(2) == (1, 0)
    assert deaths.fields() == ["1", None, "2", None]
    (job,) = deaths.other.claim([Ask(QUEUE, 9, 999)])
    assert (job.named, job.condemned, job.is_suspect) == (None, (2,), True)


async def test_a_named_text_that_runs_well_is_named_no_more(client):
    deaths = Deaths(client)
    await enqueue(client, "j")
    deaths.die()
    deaths.die(4)
    assert deaths.die(4, 0) == (1, 0)
    assert deaths.fields() == ["3", "0", None, None]
    assert deaths.die(0) == (1, 0)
    assert deaths.fields() == ["1", None, "0", None]


async def test_what_was_named_and_ran_well_is_not_named_after_a_drain_either(client):
    deaths = Deaths(client)
    await enqueue(client, "j")
    deaths.die()
    deaths.die(4)
    (job,) = deaths.other.claim([Ask(QUEUE, 9, 999)])
    assert job.named == 4
    deaths.other.mark(job, 4)
    assert deaths.fields()[1] == "4"
    deaths.other.mark(job, 0)
    deaths.other.release([job])
    assert deaths.fields() == ["2", None, None, None]


async def test_what_waited_while_others_ran_is_not_charged(client):
    deaths = Deaths(client)
    await enqueue(client, "j")
    deaths.die()
    for _ in range(10):  # of ten different neighbours
        assert deaths.die(3, None) == (1, 0)
        assert deaths.fields() == ["1", None, None, None]


async def test_a_job_that_kills_by_itself_is_buried_whole(client):
    deaths = Deaths(client)
    await enqueue(client, "j")
    assert [deaths.die("*") for _ in range(3)] == [(1, 0), (1, 0), (0, 1)]
    assert client.hget(keys.job("j"), "status") == b"failed"


async def test_deaths_that_wander_end(client):
    deaths = Deaths(client)
    await enqueue(client, "j")
    found = [deaths.die(*([] if n == 0 else [n])) for n in range(6)]
    assert found == [(1, 0)] * 5 + [(0, 1)]


async def test_a_job_has_only_so_many_condemned_texts(client):
    deaths = Deaths(client)
    await enqueue(client, "j")
    deaths.die()
    for place in range(MAX_CONDEMNED):
        assert deaths.die(place) == (1, 0)
        assert deaths.die(place) == (1, 0)
    assert deaths.die(99) == (1, 0)
    assert deaths.die(99) == (0, 1)


async def test_neighbours_of_three_poisons_are_not_buried(client):
    deaths = Deaths(client)
    await enqueue(client, "innocent", "p1", "p2", "p3")
    assert deaths.die() == (4, 0)  # all four in flight together
    for _ in range(3):  # each suspect is claimed alone: whoever dies, it is its own affair
        alone = deaths.other.claim([Ask(QUEUE, 9, 999)])
        assert len(alone) == 1
        if alone[0].id == "innocent":
            assert deaths.other.settle([Settlement(alone[0], Answer({}))]) == [True]
            return
        client.zadd(keys.lease(QUEUE), {f"{alone[0].id}:{alone[0].execution}": 1})
        deaths.other.rescue([QUEUE])
        client.lmove(keys.queue_list(QUEUE), keys.queue_list(QUEUE), "LEFT", "RIGHT")
    (last,) = deaths.other.claim([Ask(QUEUE, 9, 999)])
    assert (last.id, last.attempts) == ("innocent", 2)


async def test_a_note_needs_the_lease(client):
    await enqueue(client, "j")
    mine, other = Ledger(client, "mine", lease_s=0.01), Ledger(client, "other")
    (stale,) = mine.claim([Ask(QUEUE, 1, 99)])
    assert wait_until(lambda: other.rescue([QUEUE]) == (1, 0))
    with pytest.raises(JobCancelled):
        mine.mark(stale, 0)
    assert client.hget(keys.job("j"), "vf_at") is None


async def test_a_note_is_taken_on_a_full_redis(client):
    await enqueue(client, "j")
    mine = Ledger(client, "mine")
    (job,) = mine.claim([Ask(QUEUE, 1, 99)])
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1_000_000)
    mine.mark(job, 7)
    assert client.hget(keys.job("j"), "vf_at") == b"7"


# Callers that have gone, and texts that come again


async def ask(client, name, *, box="box", deadline_ms=0):
    route = Route(box=box, deadline_ms=deadline_ms)
    await enqueue(client, name, route=route)


async def cancel(client, *names):
    async with connect_async(client.url) as connection:
        return await QueueClient(connection).cancel(names)


@pytest.mark.parametrize("deaths", [0, 1, 2])
async def test_who_gives_up_does_not_end_what_may_have_killed(client, deaths):
    """Whenever the caller goes, the third death condemns the text."""
    deaths_of = Deaths(client)
    await ask(client, "j", deadline_ms=60_000)
    for n in range(3):
        if n == deaths:
            jobs = Ledger(client, "dying", lease_s=5).claim([Ask(QUEUE, 9, 999)])
            assert await cancel(client, "j") == 1  # its worker is dead already
            if n:
                deaths_of.other.mark(jobs[0], 0)
            client.zadd(keys.lease(QUEUE), {f"j:{jobs[0].execution}": 1})
            assert wait_until(lambda: deaths_of.other.rescue([QUEUE])) == (1, 0)
        else:
            assert deaths_of.die(*([0] if n else [])) == (1, 0)
    (job,) = deaths_of.other.claim([Ask(QUEUE, 9, 999)])
    assert (job.condemned, job.box, job.is_left) == ((0,), "", True)


async def test_a_suspect_that_waits_is_left_alone_and_runs_past_its_deadline(client):
    deaths = Deaths(client)
    await ask(client, "j", deadline_ms=60_000)
    assert deaths.die() == (1, 0)
    client.hset(keys.job("j"), "vf_deadline", 1)  # it is over now
    assert await cancel(client, "j") == 1
    (job,) = deaths.other.claim([Ask(QUEUE, 9, 999)])
    assert job.is_suspect and job.is_left
    # It went well after all, and nobody is to be told.
    assert deaths.other.settle([Settlement(job, Answer({}))]) == [True]
    assert client.keys("rq:job:*") == client.keys("*lease*") == []


async def test_what_a_living_worker_has_is_stopped_when_its_caller_goes(client):
    await ask(client, "j")
    mine = Ledger(client, "mine")
    (job,) = mine.claim([Ask(QUEUE, 1, 99)])
    assert mine.heartbeat([job], Announcement()) == set()
    assert await cancel(client, "j") == 1
    assert mine.heartbeat([job], Announcement()) == {job.execution}
    assert mine.settle([Settlement(job, Answer({}))]) == [True]
    assert client.keys("rq:job:*") == client.keys("*lease*") == []


async def test_what_was_left_and_released_is_dropped(client):
    await ask(client, "j")
    mine = Ledger(client, "mine")
    (job,) = mine.claim([Ask(QUEUE, 1, 99)])
    await cancel(client, "j")
    assert mine.release([job]) == 1
    assert mine.claim([Ask(QUEUE, 1, 99)]) == []
    assert client.keys("rq:job:*") == []


def die_at(client, deaths, digest):
    """Claim the suspect at the head and die at its first text."""
    (job,) = Ledger(client, "dying", lease_s=5).claim([Ask(QUEUE, 9, 999)])
    deaths.other.mark(job, 0, digest=digest)
    client.zadd(keys.lease(QUEUE), {f"{job.id}:{job.execution}": 1})
    return wait_until(lambda: sum(found := deaths.other.rescue([QUEUE])) and found)


def digest_of(text: str) -> str:
    (parts,) = computed_together({"texts": [text]})
    return text_key(*parts)


def awaited(payload) -> ClaimedJob:
    return ClaimedJob(
        id="call",
        execution="x",
        queue=QUEUE,
        function="vecfleet.embed",
        payload=payload,
        tokens=1,
        claimed_us=1,
        enqueued_us=1,
        attempts=1,
        box="somebody",
    )


async def test_a_text_that_killed_is_known_and_refused_in_other_jobs(client):
    deaths, bad = Deaths(client), digest_of("bad")
    known = PoisonTexts(deaths.other)
    pool, call = QUEUE.pool, {"texts": ["fine", "bad"]}
    await enqueue(client, "j")
    deaths.die()
    known.refresh([pool])
    asked = awaited(call)
    known.check(asked)
    assert die_at(client, deaths, bad) == (1, 0)
    known.refresh([pool])
    with pytest.raises(Unavailable) as raised:
        known.check(asked)
    known.check(replace(asked, box=""))  # nobody waits, who could come again
    assert raised.value.retryable and raised.value.retry_after_s
    assert known.places(pool, call) == []
    assert die_at(client, deaths, bad) == (1, 0)
    known.refresh([pool, FAST.pool])
    with pytest.raises(PoisonText) as poison:
        known.check(asked)
    assert poison.value.indices == (1,)
    assert known.places("embed.other", call) == []
    # What it was not computed with is not to blame, nor is it for another's.
    assert known.places(pool, {**call, "prompt": "another: "}) == []
    # A suspect that holds it as well does not run it.
    (first,) = deaths.other.claim([Ask(QUEUE, 9, 999)])
    deaths.other.settle([Settlement(first, Answer({}))])
    await enqueue(client, "again")
    deaths.die()
    (job,) = deaths.other.claim([Ask(QUEUE, 9, 999)])
    with pytest.raises(PoisonText):
        deaths.other.mark(job, 0, digest=bad)
    assert client.hget(keys.job("again"), "vf_at") == b""
    assert deaths.other.mark(job, 1, digest=text_key("fine")) == 0


async def test_the_deaths_at_one_text_are_counted_over_the_jobs_that_hold_it(client):
    deaths, bad = Deaths(client), text_key("bad")
    await enqueue(client, "one", "two")
    assert deaths.die() == (2, 0)
    assert die_at(client, deaths, bad) == (1, 0)
    client.lmove(keys.queue_list(QUEUE), keys.queue_list(QUEUE), "LEFT", "RIGHT")
    assert die_at(client, deaths, bad) == (1, 0)
    found = {job: deaths.fields(job)[2] for job in ("one", "two")}
    assert sorted(found.values(), key=str) == ["0", None]
    assert list(deaths.other.known_texts([QUEUE.pool])[QUEUE.pool].values()) == ["condemned"]


async def test_what_is_remembered_is_bounded_and_ends(client):
    deaths = Deaths(client)
    key = keys.poison(QUEUE.pool)
    client.zadd(key, {f"named:{n}": 2**50 for n in range(KNOWN_TEXTS)})
    client.zadd(key, {"named:old": 1})
    await enqueue(client, "j")
    deaths.die()
    die_at(client, deaths, text_key("bad"))
    assert client.zcard(key) == KNOWN_TEXTS
    client.delete(key)
    die_at(client, deaths, "no digest")
    assert client.zcard(key) == 0
    deaths.die(1)
    die_at(client, deaths, text_key("bad"))
    assert 0 < client.ttl(key) <= 3600


async def test_a_named_text_that_runs_well_is_forgotten(client):
    deaths = Deaths(client)
    await enqueue(client, "j")
    deaths.die()
    die_at(client, deaths, text_key("a"))
    ward = Ward(client)
    job = ward.claim()
    assert job.named == 0
    known = ward.ledger.known_texts([QUEUE.pool])[QUEUE.pool]
    assert known == {text_key("a"): "named"}

    async def run(place):
        return place

    texts = [("a",), ("b",)]
    assert await ward.quarantine.one_by_one(job, 2, run, texts=texts) == [0, 1]
    assert ward.ledger.known_texts([QUEUE.pool])[QUEUE.pool] == {}


# The quarantine in a worker


class Ward:
    """One suspect in a worker with two lanes."""

    def __init__(self, client, count: int = 1) -> None:
        self.windows = {
            lane: Window(max_tokens=1000, max_jobs=100) for lane in ("interactive", "bulk")
        }
        self.ledger = Ledger(client, "w1")
        self.quarantine = Quarantine(self.ledger, self.windows, urgent=lambda: [FAST])

    def claim(self):
        (job,) = self.ledger.claim([Ask(QUEUE, 1, 99)])
        self.windows["bulk"].take(job.tokens)
        self.quarantine.take([job])
        return job


async def suspect(client, **fields):
    await enqueue(client, "j")
    client.hset(keys.job("j"), mapping={"vf_attempts": 1, **fields})
    ward = Ward(client)
    return ward, ward.claim()


async def test_texts_run_one_by_one_the_named_first_the_condemned_never(client):
    ward, job = await suspect(client, vf_named=3, vf_condemned="1,4")
    ran = []

    async def run(place):
        ran.append((place, client.hget(keys.job("j"), "vf_at")))
        if place == 2:
            raise EngineFailed("no", indices=[0])
        return place

    told = await ward.quarantine.one_by_one(job, 6, run)
    assert ran == [(3, b"3"), (0, b"0"), (2, b"2"), (5, b"5")]
    assert [told[place] for place in (0, 3, 5)] == [0, 3, 5]
    assert [type(told[place]) for place in (1, 2, 4)] == [PoisonText, EngineFailed, PoisonText]
    with pytest.raises(PoisonText) as raised:
        raise_errors(told)
    assert raised.value.indices == (1, 4)


async def test_a_death_after_the_last_text_names_none(client):
    ward, job = await suspect(client, vf_named=1)

    async def run(place):
        return place

    assert await ward.quarantine.one_by_one(job, 2, run, texts=[("a",), ("b",)]) == [0, 1]
    client.zadd(keys.lease(QUEUE), {f"j:{job.execution}": 1})
    assert Ledger(client, "other").rescue([QUEUE]) == (1, 0)
    assert client.hmget(keys.job("j"), "vf_attempts", "vf_named", "vf_deaths") == [b"2", None, b"1"]
    assert client.exists(keys.poison(QUEUE.pool)) == 0


async def test_a_suspect_waits_for_others_and_keeps_them_out(client):
    ward, job = await suspect(client)
    ward.windows["bulk"].take(10)  # another one runs
    began = asyncio.Event()

    async def run(place):
        began.set()
        with ward.quarantine.claiming("interactive", 0) as may:
            assert not may
        return place

    task = asyncio.create_task(ward.quarantine.one_by_one(job, 1, run))

    def interactive_may_claim():
        with ward.quarantine.claiming("interactive", 0) as may:
            return may

    await eventually(interactive_may_claim)
    assert client.hget(keys.job("j"), "vf_at") == b""
    with ward.quarantine.claiming("bulk", 0) as may:
        assert not may
    assert not began.is_set()
    ward.windows["bulk"].give_back(10)
    assert await task == [0]
    ward.quarantine.give_back(job)
    with ward.quarantine.claiming("bulk", 0) as may:
        assert may


async def test_a_claim_that_is_under_way_is_waited_for(client):
    ward, job = await suspect(client)
    ran = []

    async def run(place):
        ran.append(place)

    with ward.quarantine.claiming("interactive", 0) as may:
        assert not may  # closed until the suspect waits
    ward.quarantine._open(True)
    with ward.quarantine.claiming("interactive", 0) as may:
        assert may
        task = asyncio.create_task(ward.quarantine.one_by_one(job, 1, run))
        closed = asyncio.create_task(asyncio.to_thread(_until_closed, ward.quarantine))
        await closed
        assert not ran
    await task
    assert ran == [0]


def _until_closed(quarantine):
    wait_until(lambda: not quarantine._is_open)


async def test_urgent_jobs_are_let_in_between_two_texts(client):
    ward, job = await suspect(client)
    await enqueue(client, "q", queue=FAST, route=Route())
    seen = []

    async def run(place):
        await asyncio.sleep(0.06)
        seen.append(client.hget(keys.job("j"), "vf_at"))
        return place

    task = asyncio.create_task(ward.quarantine.one_by_one(job, 20, run))

    def visit():
        with ward.quarantine.claiming("interactive", 0.05) as may:
            return may and bool(seen)

    assert await eventually(lambda: asyncio.to_thread(visit))
    assert len(seen) < 20
    await task
    assert seen == [b"%d" % place for place in range(20)]


async def test_a_lost_job_ends_its_quarantine(client):
    ward, job = await suspect(client)

    async def run(place):
        async with connect_async(client.url) as connection:
            await QueueClient(connection).cancel(["j"])
        return place

    with pytest.raises(JobCancelled):
        await ward.quarantine.one_by_one(job, 3, run)


def test_errors_of_one_kind_are_told_together():
    told = [1, TextsTooLong(indices=[0]), 2, TextsTooLong(indices=[0])]
    with pytest.raises(TextsTooLong) as raised:
        raise_errors(told)
    assert raised.value.indices == (1, 3)
    assert raise_errors([1, 2]) == [1, 2]


async def test_a_block_in_quarantine_costs_one_small_call_a_text(client):
    ward, job = await suspect(client)

    async def run(place):
        return place

    client.config_resetstat()
    began = time.perf_counter()
    await ward.quarantine.one_by_one(job, 256, run)
    took_s = time.perf_counter() - began
    calls = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert calls <= 256 + 3, f"{calls} calls in {took_s:.3f} s"


async def test_suspects_take_turns_and_a_short_one_does_not_wait_for_a_long_one(client):
    ward, block = await suspect(client)
    await enqueue(client, "call", queue=FAST)
    client.hset(keys.job("call"), "vf_attempts", 1)
    (call,) = ward.ledger.claim([Ask(FAST, 1, 99)])
    ward.windows["interactive"].take(call.tokens)
    ward.quarantine.take([call])
    ran, at_once = [], 0

    async def run(place):
        nonlocal at_once
        at_once += 1
        assert at_once == 1, "never two in the engine"
        await asyncio.sleep(0.03)
        at_once -= 1
        ran.append("block")

    async def run_call(place):
        assert client.hget(keys.job(block.id), "vf_at") == b"", "the other is noted as waiting"
        await run(place)
        ran[-1] = "call"

    long = asyncio.create_task(ward.quarantine.one_by_one(block, 40, run))
    await eventually(lambda: bool(ran))
    await ward.quarantine.one_by_one(call, 1, run_call)
    assert ran.count("block") < 40
    assert not long.done()
    ward.windows["interactive"].give_back(call.tokens)
    ward.quarantine.give_back(call)
    await long
    assert ran.count("block") == 40
