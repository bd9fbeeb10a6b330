"""A text that is in many jobs: what deaths at it say of it, and what its survival says."""

from __future__ import annotations

from typing import Any

import pytest

from vecfleet.common import codec, keys, payloads
from vecfleet.common.hashing import text_key
from vecfleet.common.payloads import computed_together
from vecfleet.common.queue_client import NewJob, Route
from vecfleet.worker.embed_handler import EmbedHandler
from vecfleet.worker.fake_engine import FakeEngine, FakeSettings
from vecfleet.worker.job import Abandoned, ClaimedJob, HandOn, Settlement
from vecfleet.worker.ledger import CONDEMNED, NAMED, Ask, Ledger
from vecfleet.worker.quarantine import Quarantine
from vecfleet.worker.rerank_handler import RerankHandler
from vecfleet.worker.window import Window

UID = "c0ffee"
COMMON = "N/A"


def digest_of(text: str) -> str:
    (parts,) = computed_together({"texts": [text]})
    return text_key(*parts)


@pytest.fixture
async def engine():
    engine = await FakeEngine.load(FakeSettings())
    yield engine
    await engine.close()


class Fleet:
    """Workers that claim one job each, and die when they are told to."""

    def __init__(self, client, queues, engine) -> None:
        self.client, self.queues, self.engine = client, queues, engine
        self.queue = keys.embed_queue(engine.card.space, "bulk")
        self.ledger = Ledger(client, "w")
        windows = {lane: Window(max_tokens=1000, max_jobs=100) for lane in keys.LANES}
        self.windows = windows
        self.quarantine = Quarantine(self.ledger, windows)

    async def put(
        self, *names: str, texts: tuple[str, ...] = ("x", COMMON, "y"), truncate: bool = True
    ) -> None:
        payload = {
            "ids": [f"d{n}" for n in range(len(texts))],
            "texts": list(texts),
            "versions": [1] * len(texts),
            "uid": UID,
            "truncate": truncate,
            "space": self.engine.card.space,
        }
        data = codec.pack_call(payloads.EMBED, payload)
        jobs = [NewJob(name, data, 30, 0, len(texts)) for name in names]
        await self.queues.enqueue(self.queue, jobs, Route(merge_queue=str(keys.merge_queue(UID))))

    async def put_suspects(self, *names: str) -> list[ClaimedJob]:
        """Jobs whose worker died once, each claimed by a worker that has it alone."""
        await self.put(*names)
        self.kill(*self.ledger.claim([Ask(self.queue, 99, 9999)]))
        found = [self.claim() for _ in names]
        return sorted(found, key=lambda job: job.id)

    def claim(self) -> ClaimedJob:
        (job,) = self.ledger.claim([Ask(self.queue, 1, 9999)])
        return job

    def note(self, job: ClaimedJob, *places: int) -> None:
        """Its worker has run all but the last of ``places``, and has that in its engine."""
        parts = computed_together(job.payload)
        for place in places:
            self.ledger.mark(job, place, digest=text_key(*parts[place]))

    def kill(self, *jobs: ClaimedJob) -> None:
        assert all(self.ledger.settle([Settlement(job, Abandoned()) for job in jobs]))
        assert self.ledger.rescue([self.queue]) == (len(jobs), 0)

    async def run(self, job: ClaimedJob) -> Any:
        """What becomes of a job in a worker that lives."""
        self.windows["bulk"].take(job.tokens)
        self.quarantine.take([job])
        self.quarantine.poison.refresh([self.queue.pool])
        try:
            return await EmbedHandler(self.engine, self.quarantine)(job)
        finally:
            self.windows["bulk"].give_back(job.tokens)
            self.quarantine.give_back(job)

    @property
    def known(self) -> dict[str, str]:
        return self.ledger.known_texts([self.queue.pool])[self.queue.pool]


@pytest.fixture
def fleet(client, queues, engine):
    return Fleet(client, queues, engine)


async def test_workers_that_are_killed_at_one_moment_condemn_no_text(fleet):
    first, second = await fleet.put_suspects("a", "b")
    for job in (first, second):
        fleet.note(job, 0, 1)
    fleet.kill(first, second)
    assert fleet.known == {digest_of(COMMON): NAMED}
    await fleet.put("c")  # was in no death
    for _ in range(3):
        outcome = await fleet.run(fleet.claim())
        assert isinstance(outcome, HandOn) and (outcome.documents, outcome.refused) == (3, [])
    assert fleet.known == {}


async def test_a_text_that_was_named_elsewhere_is_condemned_by_its_next_death(fleet):
    first, second = await fleet.put_suspects("a", "b")
    fleet.note(first, 0, 1)
    fleet.kill(first)
    fleet.note(second, 0, 1)  # although it is named
    fleet.kill(second)
    assert fleet.known == {digest_of(COMMON): CONDEMNED}
    outcome = await fleet.run(fleet.claim())
    assert [entry.place for entry in outcome.refused] == [1]


async def test_a_death_at_a_text_that_was_condemned_meanwhile_counts_with_it(fleet):
    slow, quick = await fleet.put_suspects("a", "b")
    fleet.note(slow, 0, 1)
    fleet.note(quick, 0, 1)
    fleet.kill(quick)
    again = fleet.claim()
    fleet.note(again, 1)
    fleet.kill(again)
    assert fleet.known == {digest_of(COMMON): CONDEMNED}
    fleet.kill(slow)
    assert fleet.known == {digest_of(COMMON): CONDEMNED}
    assert fleet.client.hget(keys.job("a"), "vf_condemned") == b"1"


async def test_a_suspect_that_survives_a_text_clears_it_in_whichever_job_it_was_named(fleet):
    first, second = await fleet.put_suspects("a", "b")
    fleet.note(first, 0, 1)
    fleet.kill(first)
    outcome = await fleet.run(second)
    assert (outcome.documents, outcome.refused) == (3, [])
    assert fleet.known == {}


async def test_what_waits_its_turn_with_a_text_has_not_survived_it(fleet):
    first, second = await fleet.put_suspects("a", "b")
    fleet.note(first, 0, 1)
    fleet.kill(first)
    fleet.note(second, 0, 1)
    fleet.ledger.mark(second, None)  # others first
    fleet.note(second, 1)
    assert fleet.known == {digest_of(COMMON): NAMED}
    fleet.ledger.mark(second, "*")
    assert fleet.known == {}


async def test_an_ordinary_block_that_survives_a_text_clears_it(fleet):
    (first,) = await fleet.put_suspects("a")
    fleet.note(first, 0, 1)
    fleet.kill(first)
    first = fleet.claim()  # another worker has it, and has not begun
    await fleet.put("b", texts=("p", "q"))
    assert (await fleet.run(fleet.claim())).documents == 2
    assert fleet.known == {digest_of(COMMON): NAMED}, "it was not in that one"
    await fleet.put("c")
    assert (await fleet.run(fleet.claim())).documents == 3
    assert fleet.known == {}


@pytest.mark.parametrize("kind", ["embed", "rerank"])
async def test_an_ordinary_call_that_survives_a_text_clears_it(fleet, kind):
    payload: dict[str, Any] = {"texts": ["x", COMMON]}
    if kind == "rerank":
        payload = {"query": "q", "documents": ["x", COMMON]}
    parts = computed_together(payload)[1]
    name = f"{NAMED}:{text_key(*parts)}"
    fleet.client.zadd(keys.poison(fleet.queue.pool), {name: 2**50, f"{NAMED}:other": 2**50})
    fleet.quarantine.poison.refresh([fleet.queue.pool])
    handler = (RerankHandler if kind == "rerank" else EmbedHandler)(fleet.engine, fleet.quarantine)
    await fleet.queues.enqueue(fleet.queue, [NewJob("call", codec.pack_call("f", payload), 2)])
    await handler(fleet.claim())
    assert fleet.known == {"other": NAMED}


async def test_a_text_that_has_run_well_elsewhere_is_condemned_by_no_single_death(fleet):
    first, second = await fleet.put_suspects("a", "b")
    fleet.note(first, 0, 1)
    fleet.kill(first)
    first = fleet.claim()
    fleet.note(second, 0, 1)  # named in another job, so in this one too
    await fleet.put("c")
    assert (await fleet.run(fleet.claim())).documents == 3
    for job in (second, first):
        if job is first:
            fleet.note(first, 1)
        fleet.kill(job)
        assert fleet.known == {digest_of(COMMON): NAMED}, job.id
        again = fleet.claim()
        assert again.id == job.id
        assert (await fleet.run(again)).refused == []
        assert fleet.known == {}
    fleet.client.flushall()


async def test_a_text_that_was_cleared_and_kills_twice_more_is_condemned(fleet):
    (first,) = await fleet.put_suspects("a")
    fleet.note(first, 0, 1)
    fleet.kill(first)
    fleet.ledger.acquit(fleet.queue.pool, [digest_of(COMMON)])
    for known in (NAMED, CONDEMNED):
        job = fleet.claim()
        fleet.note(job, 1)
        fleet.kill(job)
        assert fleet.known == {digest_of(COMMON): known}


@pytest.mark.parametrize("is_suspect", [False, True])
async def test_a_text_that_was_too_long_to_be_run_is_not_cleared(fleet, is_suspect):
    long = "word " * 10_000
    name = f"{NAMED}:{digest_of(long)}"
    fleet.client.zadd(keys.poison(fleet.queue.pool), {name: 2**50})
    await fleet.put("a", texts=("x", long, "y"), truncate=False)
    job = fleet.claim()
    if is_suspect:
        fleet.kill(job)
        job = fleet.claim()
    outcome = await fleet.run(job)
    assert [entry.error.code for entry in outcome.refused] == ["texts_too_long"]
    assert outcome.documents == 2
    if is_suspect:
        fleet.ledger.mark(job, "*")
    assert fleet.known == {digest_of(long): NAMED}


async def test_a_text_that_kills_costs_few_deaths_in_however_many_jobs(fleet):
    """At most three in any one of them, and what two workers have at one moment in all."""
    suspects = await fleet.put_suspects(*(f"j{n:02d}" for n in range(20)))
    at_work, deaths = suspects[:2], 1  # two workers; the others' jobs go back
    assert fleet.ledger.release(suspects[2:]) == 18
    for _ in range(20):
        dying = []
        for job in at_work:
            try:
                fleet.note(job, job.named if job.named is not None else 1)
                dying.append(job)
            except Exception as error:
                assert getattr(error, "code", "") == "poison_text", error
        if not dying:
            break
        fleet.kill(*dying)
        deaths += len(dying)
        at_work = [fleet.claim() for _ in range(2)]
    assert deaths <= 5
    assert fleet.known == {digest_of(COMMON): CONDEMNED}
