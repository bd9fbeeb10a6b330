"""Texts that kill their worker: at most three deaths each, and nobody else pays for them."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from servers import Process, eventually

from vecfleet.common import codec, keys
from vecfleet.common.document import cut_blocks, parse_document
from vecfleet.common.errors import DeadlineExceeded, PoisonText, Unavailable
from vecfleet.common.fleet_client import DEFAULT_TIMEOUT_S, FleetClient
from vecfleet.common.redis_client import connect_async
from vecfleet.worker.fake_engine import ABORT, BREAK, HANG

ROLE = Path(__file__).parent.parent / "odd_role.py"
LEASE_S = 1.0
KILLED = -signal.SIGABRT
ENDED = 1  # the exit code of a worker whose engine hung or broke
MAX_STEP_S = 8.0  # a machine that stands still for a few seconds is no engine that hangs


class Ward:
    """A fleet whose workers are started again when they die; their deaths are counted."""

    def __init__(self, url: str, data: Path, lease_s: float) -> None:
        self.url, self.data, self.lease_s = url, data, lease_s
        self.deaths = 0
        self.processes: list[Process] = []
        self._keepers: list[asyncio.Task[None]] = []

    def start(self, role: str, step_s: float = 0.0, max_step_s: float = MAX_STEP_S) -> Process:
        arguments = [ROLE, self.lease_s, 0, role, self.url, self.data, step_s, max_step_s]
        process = Process([sys.executable, *map(str, arguments)])
        self.processes.append(process)
        return process

    async def begin(self, workers: int = 1, step_s: float = 0.0) -> None:
        for role in ("aggregator", "search"):
            await asyncio.to_thread(self.start(role).wait_for_line, f"{role} ready")
        for _ in range(workers):
            await self.begin_worker(step_s)

    async def begin_worker(self, step_s: float = 0.0) -> None:
        first = self.start("worker", step_s)
        await asyncio.to_thread(first.wait_for_line, "worker ready")
        self._keepers.append(asyncio.create_task(self._keep(first, step_s)))

    async def _keep(self, process: Process, step_s: float) -> None:
        while True:
            code = await asyncio.to_thread(process.wait, 300)
            if code not in (KILLED, ENDED):
                return
            self.deaths += 1
            process = self.start("worker", step_s)

    async def close(self) -> None:
        for process in self.processes:
            process.close()
        await asyncio.gather(*self._keepers, return_exceptions=True)


@pytest.fixture
def ward(redis_server_factory, tmp_path):
    @asynccontextmanager
    async def open_ward(*, lease_s=LEASE_S, timeout_s=60.0, **options):
        ward = Ward(redis_server_factory().url, tmp_path / "data", lease_s)
        try:
            await ward.begin(**options)
            async with FleetClient(connect_async(ward.url), timeout_s=timeout_s) as client:
                yield ward, client
        finally:
            await ward.close()

    return open_ward


def rows(prefix: str, count: int, poison: tuple[int, ...] = (), marker: str = ABORT):
    return [
        parse_document(
            {
                "id": f"{prefix}/{n}",
                "text": f"{prefix} {n} {marker if n in poison else 'is well'}",
            }
        )
        for n in range(count)
    ]


async def submit(client, collection, name, blocks):
    await client.submissions.open(name, tenant="-", collection=collection.name, uid=collection.uid)
    for place, block in enumerate(blocks):
        (made,) = cut_blocks(block)
        await client.enqueue_block(collection, made, submission=name, place=place)
    documents = sum(map(len, blocks))
    await client.submissions.close(name, blocks=len(blocks), documents=documents)


async def done(client, name):
    async def is_done():
        return (await client.submissions.get(name)).state == "done"

    await eventually(is_done, 120, f"submission {name}")
    return await client.submissions.get(name, with_errors=True)


async def drains(client):
    """Whether a worker does."""
    names = await client.redis.keys("vf:worker:worker-*")
    return b"draining" in [await client.redis.hget(name, "state") for name in names]


async def dead_texts(client, queue):
    """What sits in the dead letter: each text by itself, with the code of its error."""
    found = {}
    for raw in await client.redis.zrange(f"rq:failed:{queue}", 0, -1):
        data, error = await client.redis.hmget(f"rq:job:{raw.decode()}", "data", "vf_error")
        _, (payload,), _ = codec.unpack_call(data)
        assert len(payload["ids"]) == 1
        found[payload["ids"][0]] = codec.loads(error)["code"]
    return found


async def test_a_text_that_kills_costs_three_deaths_and_no_neighbour(ward):
    async with ward() as (fleet, client):
        collection = await client.create_collection("c", model="fake")
        blocks = [rows("a", 30), rows("b", 40, poison=(17,)), rows("c", 30)]
        await submit(client, collection, "s", blocks)
        state = await done(client, "s")
        assert fleet.deaths == 3
        assert (state.committed, state.failed) == (99, 1)
        assert [(e["id"], e["code"]) for e in state.errors] == [("b/17", "poison_text")]
        queue = keys.embed_queue(collection.spec.space, "bulk")
        assert await dead_texts(client, queue) == {"b/17": "poison_text"}
        assert (await client.collection_stats(collection))["documents"] == 99


async def test_a_text_on_which_the_engine_hangs_is_found_like_one_that_kills(ward):
    async with ward() as (fleet, client):
        collection = await client.create_collection("c", model="fake")
        await submit(client, collection, "s", [rows("a", 30, poison=(17,), marker=HANG)])
        state = await done(client, "s")
        assert 1 < fleet.deaths <= 3
        assert (state.committed, state.failed) == (29, 1)
        assert [(e["id"], e["code"]) for e in state.errors] == [("a/17", "poison_text")]
        ended = [process for process in fleet.processes if not process.running()]
        assert len(ended) == fleet.deaths
        for output in (process.output for process in ended):
            assert "the engine has done no step for" in output
            assert "in _try" in output  # where each thread stood


async def test_two_sigterms_end_a_worker_whose_engine_hangs(ward):
    async with ward(workers=0) as (fleet, client):
        worker = fleet.start("worker", max_step_s=10.0)
        await asyncio.to_thread(worker.wait_for_line, "worker ready")
        collection = await client.create_collection("c", model="fake")
        await submit(client, collection, "s", [rows("a", 3, poison=(1,), marker=HANG)])
        key = keys.job("s-0")

        async def is_started():
            return await client.redis.hget(key, "status") == b"started"

        await eventually(is_started)
        worker.signal(signal.SIGTERM)
        await eventually(partial(drains, client))
        worker.signal(signal.SIGTERM)
        await asyncio.to_thread(worker.wait_for_line, "released 1 unfinished jobs")
        assert await client.redis.hmget(key, "status", "vf_attempts") == [b"queued", b"0"]
        assert await asyncio.to_thread(worker.wait, 60) == ENDED
        assert "the engine has done no step for" in worker.output
        assert "in _try" in worker.output  # where each thread stood


async def test_a_text_that_breaks_the_engine_for_good_is_found_like_one_that_kills(ward):
    async with ward() as (fleet, client):
        collection = await client.create_collection("c", model="fake")
        blocks = [rows("a", 30), rows("b", 40, poison=(17,), marker=BREAK), rows("c", 30)]
        await submit(client, collection, "s", blocks)
        with pytest.raises(PoisonText) as raised:
            await client.embed(["fine", f"a {BREAK} query"])
        assert raised.value.indices == (1,)
        state = await done(client, "s")
        assert (state.committed, state.failed) == (99, 1)
        assert [(e["id"], e["code"]) for e in state.errors] == [("b/17", "poison_text")]
        assert 3 <= fleet.deaths <= 6
        ended = [process for process in fleet.processes if not process.running()]
        assert len(ended) == fleet.deaths
        assert all("the engine fails on every text" in process.output for process in ended)


async def test_a_text_that_breaks_the_engine_costs_three_ends_where_queries_come_too(ward):
    """They end sooner than the block that did it: it must not be given back as if it were well."""
    async with ward(step_s=0.02) as (fleet, client):
        collection = await client.create_collection("c", model="fake")
        blocks = [rows(f"b{n}", 64, poison=(0,) if n == 3 else (), marker=BREAK) for n in range(8)]
        await submit(client, collection, "s", blocks)

        async def ask():
            while True:
                with suppress(Unavailable, DeadlineExceeded):
                    await client.embed(["a query"])
                await asyncio.sleep(0.02)

        asking = asyncio.create_task(ask())
        state = await done(client, "s")
        asking.cancel()
        assert (state.committed, state.failed, fleet.deaths) == (511, 1, 3)
        assert [(e["id"], e["code"]) for e in state.errors] == [("b3/0", "poison_text")]


async def test_many_poisons_and_two_workers_bury_nobody_else(ward):
    async with ward(workers=2) as (fleet, client):
        collection = await client.create_collection("c", model="fake")
        bad = {0: (3, 9), 2: (0,), 4: (19,)}
        blocks = [rows(f"b{n}", 20, poison=bad.get(n, ())) for n in range(6)]
        await submit(client, collection, "s", blocks)
        state = await done(client, "s")
        poisons = {f"b{n}/{place}" for n, places in bad.items() for place in places}
        assert {e["id"] for e in state.errors} == poisons
        assert (state.committed, state.failed) == (120 - len(poisons), len(poisons))
        assert fleet.deaths <= 3 * len(poisons)
        queue = keys.embed_queue(collection.spec.space, "bulk")
        assert set(await dead_texts(client, queue)) == poisons


async def test_workers_that_are_killed_together_at_a_common_text_condemn_it_nowhere(ward):
    async with ward(workers=0) as (fleet, client):
        first = fleet.start("worker")
        await asyncio.to_thread(first.wait_for_line, "worker ready")
        collection = await client.create_collection("c", model="fake")
        first.signal(signal.SIGTERM)
        assert await asyncio.to_thread(first.wait, 30) == 0
        same = [
            [parse_document({"id": f"{name}/{n}", "text": "N/A"}) for n in range(40)]
            for name in "ab"
        ]
        await submit(client, collection, "s", same)
        for place in range(2):  # as if the one worker that had both had been killed
            await client.redis.hset(keys.job(f"s-{place}"), "vf_attempts", 1)
        workers = [fleet.start("worker", step_s=0.05) for _ in range(2)]

        async def both_have_one():
            at = [await client.redis.hget(keys.job(f"s-{n}"), "vf_at") for n in range(2)]
            return all(place is not None and place.isdigit() for place in at)

        await eventually(both_have_one, 60, "both in quarantine")
        for worker in workers:
            worker.signal(signal.SIGKILL)

        lease = keys.lease(keys.embed_queue(collection.spec.space, "bulk"))

        async def both_are_over():  # then they are judged together
            seconds, _ = await client.redis.time()
            return await client.redis.zcount(lease, "-inf", seconds * 1000) == 2

        await eventually(both_are_over, 60, "the leases")
        last = fleet.start("worker")
        state = await done(client, "s")
        assert "rescued 2" in last.output
        assert (state.committed, state.failed) == (80, 0)


async def test_who_waits_for_a_poisonous_text_is_told_which_it_is(ward):
    async with ward() as (fleet, client):
        asked = [f"text {n}" for n in range(5)]
        good = asyncio.create_task(client.embed(asked))
        with pytest.raises(PoisonText) as raised:
            await client.embed([*asked, f"a {ABORT} text", "more"])
        assert raised.value.indices == (5,)
        assert fleet.deaths <= 3
        assert len(await good) == 5
        before = fleet.deaths
        with pytest.raises(PoisonText) as raised:
            await client.rerank("a question", ["fine", "fine too", f"{ABORT}"])
        assert raised.value.indices == (2,)
        assert fleet.deaths - before <= 3
        before = fleet.deaths
        with pytest.raises(PoisonText) as raised:
            await client.embed(["fine", f"a {ABORT} text"])
        assert (raised.value.indices, fleet.deaths) == ((1,), before)
        entries = (await client.dead_letter.page()).entries
        assert {e.code for e in entries} == {"poison_text"}
        texts = sorted([d.text for d in e.documents] for e in entries)
        assert texts == [[f"a {ABORT} text"], ["a question", ABORT]]
        left = {raw.decode() for raw in await client.redis.keys("rq:job:*")}
        assert left == {keys.job(e.id) for e in entries}


async def test_a_caller_that_gives_up_and_tries_again_costs_no_more_deaths(ward):
    """At production's settings: the caller goes after 30 s, the verdict comes after 33."""
    production = {"lease_s": 0, "timeout_s": DEFAULT_TIMEOUT_S, "workers": 2}
    async with ward(**production) as (fleet, client):
        text = f"a {ABORT} query"
        with pytest.raises((DeadlineExceeded, PoisonText)):
            await client.embed([text])
        verdict = None

        async def judged():
            nonlocal verdict
            try:
                await client.embed([text])
            except Unavailable:
                return False  # it is being judged: come again
            except PoisonText as error:
                verdict = error
                return True

        await eventually(judged, 120, "the verdict")
        assert verdict.indices == (0,)
        assert fleet.deaths == 3
        (entry,) = (await client.dead_letter.page()).entries
        assert (entry.code, [d.text for d in entry.documents]) == ("poison_text", [text])
        assert len(await client.embed(["all is well"])) == 1


async def test_sigterm_in_the_quarantine_charges_nothing(ward):
    async with ward(step_s=0.05) as (fleet, client):
        collection = await client.create_collection("c", model="fake")
        await submit(client, collection, "s", [rows("a", 80, poison=(79,))])
        key = keys.job("s-0")

        async def at():
            raw = await client.redis.hget(key, "vf_at")
            return int(raw) if raw and raw.isdigit() and int(raw) > 0 else None

        place = await eventually(at, 60, "the quarantine")
        assert place < 79
        attempts = int(await client.redis.hget(key, "vf_attempts"))
        worker = fleet.processes[-1]
        worker.signal(signal.SIGTERM)
        await eventually(partial(drains, client))
        worker.signal(signal.SIGTERM)
        assert await asyncio.to_thread(worker.wait, 30) == 0
        left = await client.redis.hmget(key, "vf_attempts", "vf_at", "vf_named")
        assert left == [b"%d" % (attempts - 1), None, None]
        await fleet.begin_worker()
        state = await done(client, "s")
        assert (state.committed, state.failed, fleet.deaths) == (79, 1, 3)


async def test_queries_go_on_beside_the_quarantine(ward):
    async with ward(step_s=0.02) as (fleet, client):
        collection = await client.create_collection("c", model="fake")
        await submit(client, collection, "s", [rows("a", 200, poison=(199,))])

        async def in_quarantine():
            return await client.redis.hget(keys.job("s-0"), "vf_at") not in (None, b"*")

        await eventually(in_quarantine, 60)
        for n in range(5):
            assert len(await client.embed([f"query {n}"])) == 1
        assert await client.redis.exists(keys.job("s-0"))
        state = await done(client, "s")
        assert (state.committed, state.failed, fleet.deaths) == (199, 1, 3)
