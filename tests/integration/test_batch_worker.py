"""The worker's life on a real Redis: what it claims, how it ends, what it survives."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from contextlib import asynccontextmanager

import pytest
import redis
from rq import Queue
from rq.job import Job, JobStatus
from servers import eventually

from vecfleet.common import codec, keys
from vecfleet.common.codec import Serializer
from vecfleet.common.errors import (
    EngineDied,
    EngineStarting,
    InvalidInput,
    JobFailed,
    RedisUnavailable,
)
from vecfleet.common.queue_client import NewJob, QueueClient, Route
from vecfleet.common.redis_client import connect, connect_async
from vecfleet.common.reply_box import ReplyBox
from vecfleet.worker.batch_worker import BatchWorker
from vecfleet.worker.handlers import Direct, Many, One
from vecfleet.worker.heartbeat import Timing
from vecfleet.worker.job import Answer, Release
from vecfleet.worker.ledger import Announcement, Ledger
from vecfleet.worker.window import Window

BULK = keys.embed_queue("5pace", "bulk")
FAST = keys.embed_queue("5pace", "interactive")
QUICK = Timing(heartbeat_s=0.05, rescue_s=0.05, drain_s=20)


class Fleet:
    """A Redis client, a reply box, and workers that run in this test's loop."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.redis = connect(url)
        self.queues = QueueClient(connect_async(url))
        self.box = ReplyBox(connect_async(url))
        self.events: Counter[str] = Counter()
        self._workers: list[tuple[asyncio.Task, asyncio.Event, asyncio.Event]] = []

    def start(
        self,
        handlers,
        *,
        name="w1",
        bulk_tokens=1000,
        lease_s=10.0,
        queues=(FAST, BULK),
        is_ready=lambda: True,
    ):
        def count(event: str, number: int) -> None:
            self.events[event] += max(number, 1)

        worker = BatchWorker(
            Ledger(connect(self.url), name, lease_s=lease_s),
            queues=lambda: list(queues),
            handlers=handlers,
            windows={
                "interactive": Window(max_tokens=1000, max_jobs=100),
                "bulk": Window(max_tokens=bulk_tokens, max_jobs=100),
            },
            announce=lambda: Announcement(pools=("embed.5pace",)),
            timing=QUICK,
            on_event=count,
            is_ready=is_ready,
        )
        stop, hurry = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(worker.run(stop, hurry=hurry))
        self._workers.append((task, stop, hurry))
        return task, stop, hurry

    async def ask(self, number, payload, *, queue=FAST, function="echo"):
        job = NewJob(f"j-{number}", codec.pack_call(function, payload), 10)
        future = self.box.expect(job.id)
        await self.queues.enqueue(queue, [job], Route(box=self.box.name))
        return await self.box.wait(job.id, future, 20)

    async def close(self):
        for task, stop, hurry in self._workers:
            stop.set()
            hurry.set()
            await asyncio.gather(task, return_exceptions=True)
        await self.box.close()


@pytest.fixture
async def fleet(redis_url):
    made = Fleet(redis_url)
    await made.box.open()
    yield made
    await made.close()


async def echo(job):
    return Answer({"got": job.payload})


async def test_answers_come_back_to_whoever_asked(fleet):
    fleet.start({"echo": One(echo)})
    answers = await asyncio.gather(*(fleet.ask(n, {"n": n}) for n in range(200)))
    assert [a["got"]["n"] for a in answers] == list(range(200))
    assert fleet.redis.keys("rq:job:*") == []


async def test_only_functions_of_the_allow_list_run(fleet, tmp_path):
    fleet.start({"echo": One(echo)})
    canary = tmp_path / "canary"
    with pytest.raises(InvalidInput, match=r"os\.system"):
        await fleet.ask(1, f"touch {canary}", function="os.system")
    stock = Queue(str(BULK), connection=fleet.redis, serializer=Serializer)
    evil = stock.enqueue("os.system", f"touch {canary}")
    pickled = Queue(str(BULK), connection=fleet.redis).enqueue("os.system", f"touch {canary}")
    for job in (evil, pickled):
        await eventually(lambda job=job: job.get_status() == JobStatus.FAILED)
    assert not canary.exists()


async def test_a_stock_job_gets_its_result(fleet):
    fleet.start({"echo": One(echo)})
    stock = Queue(str(BULK), connection=fleet.redis, serializer=Serializer)
    theirs = stock.enqueue("echo", {"a": [1, 2]})
    await eventually(lambda: theirs.get_status() == JobStatus.FINISHED)
    done = Job.fetch(theirs.id, connection=fleet.redis, serializer=Serializer)
    assert done.return_value() == {"got": {"a": [1, 2]}}


async def test_an_error_of_one_job_is_its_own(fleet):
    async def picky(job):
        if job.payload["n"] == 3:
            raise RuntimeError("poison")
        if job.payload["n"] == 4:
            raise InvalidInput("no", field="n")
        return Answer(job.payload)

    fleet.start({"echo": One(picky)})
    answers = await asyncio.gather(
        *(fleet.ask(n, {"n": n}) for n in range(6)), return_exceptions=True
    )
    assert [type(a) for a in answers] == [dict, dict, dict, JobFailed, InvalidInput, dict]
    assert answers[4].field == "n"


class Panic(BaseException):
    """As libraries in Rust raise: no ``Exception``."""


@pytest.mark.parametrize("kind", [One, Many, Direct])
async def test_a_panic_of_one_job_is_its_own(fleet, kind):
    def direct(jobs):
        if any(job.payload == "bad" for job in jobs):
            raise Panic("found itself at fault")
        return [Answer(job.payload) for job in jobs]

    async def many(jobs):
        return direct(jobs)

    async def one(job):
        return direct([job])[0]

    fleet.start({"work": kind({One: one, Many: many, Direct: direct}[kind])})
    with pytest.raises(JobFailed, match="at fault"):
        await fleet.ask(1, "bad", function="work")
    assert await fleet.ask(2, "good", function="work") == "good"
    assert fleet.redis.keys("rq:job:*") == []


async def test_what_is_claimed_together_runs_together(fleet):
    sizes = []

    async def many(jobs):
        sizes.append(len(jobs))
        return [Answer(job.id) for job in jobs]

    jobs = [NewJob(f"j-{n}", codec.pack_call("many", n), 1) for n in range(50)]
    futures = [fleet.box.expect(job.id) for job in jobs]
    await fleet.queues.enqueue(BULK, jobs, Route(box=fleet.box.name))
    fleet.start({"many": Many(many)})
    assert await asyncio.gather(*futures) == [job.id for job in jobs]
    assert sum(sizes) == 50 and max(sizes) > 10


async def test_what_cannot_be_done_here_goes_back_uncharged(fleet):
    seen = []

    async def hand_back_twice(jobs):
        seen.extend(job.attempts for job in jobs)
        return [Answer("done") if len(seen) > 2 else Release() for _ in jobs]

    fleet.start({"merge": Many(hand_back_twice)})
    assert await fleet.ask(1, 1, function="merge") == "done"
    assert seen == [1, 1, 1]
    assert fleet.redis.keys("rq:job:*") == []
    assert fleet.redis.keys("vf:load:*") == []


async def test_direct_functions_run_in_the_thread_that_claims(fleet):
    threads = set()

    def direct(jobs):
        threads.add(threading.current_thread().name)
        if any(job.payload == 7 for job in jobs):
            raise RuntimeError("poison")
        return [Answer({"n": job.payload}) for job in jobs]

    fleet.start({"direct": Direct(direct), "echo": One(echo)})
    for number in range(9):
        asking = fleet.ask(number, number, function="direct")
        if number == 7:
            with pytest.raises(JobFailed):
                await asking
        else:
            assert await asking == {"n": number}
    assert await fleet.ask(10, {"n": 10}) == {"got": {"n": 10}}
    assert threads == {"claim-interactive"}
    assert fleet.redis.keys("rq:job:*") == []


@pytest.mark.parametrize("kind", [Direct, Many])
async def test_a_handler_that_answers_too_few_jobs_fails_them_and_the_worker_goes_on(fleet, kind):
    def some(jobs):
        return [Answer("good")] if jobs[0].payload == "good" else []

    async def some_later(jobs):
        return some(jobs)

    fleet.start({"read": Direct(some) if kind is Direct else Many(some_later)})
    with pytest.raises(JobFailed, match="shorter"):
        await fleet.ask(1, "bad", function="read")
    assert await fleet.ask(2, "good", function="read") == "good"
    assert fleet.redis.keys("rq:job:*") == []


async def test_an_answer_of_a_direct_function_outlives_a_failing_settle(fleet, monkeypatch):
    settle, failures = Ledger.settle, []

    def failing(self, settlements):
        if not failures:
            failures.append(1)
            raise RedisUnavailable("away")
        return settle(self, settlements)

    monkeypatch.setattr(Ledger, "settle", failing)
    fleet.start({"direct": Direct(lambda jobs: [Answer(job.id) for job in jobs])})
    assert await fleet.ask(1, 1, function="direct") == "j-1"
    assert failures


async def test_a_full_bulk_window_does_not_hold_up_a_query(fleet):
    gate = asyncio.Event()

    async def slow(job):
        await gate.wait()
        return Answer({})

    jobs = [NewJob(f"b-{n}", codec.pack_call("slow", n), 10) for n in range(30)]
    await fleet.queues.enqueue(BULK, jobs)
    fleet.start({"slow": One(slow), "echo": One(echo)}, bulk_tokens=50)
    await eventually(lambda: fleet.redis.zcard(keys.lease(BULK)) == 5)
    assert (await fleet.ask(1, {"q": 1}))["got"] == {"q": 1}
    assert fleet.redis.llen(keys.queue_list(BULK)) == 25
    gate.set()
    await eventually(lambda: fleet.redis.keys("rq:job:b-*") == [])


async def test_sigterm_finishes_what_runs_and_claims_nothing_more(fleet):
    gate = asyncio.Event()

    async def slow(job):
        await gate.wait()
        return Answer(job.payload)

    waiting = asyncio.create_task(fleet.ask(1, {"n": 1}, function="slow"))
    task, stop, _ = fleet.start({"slow": One(slow)})
    await eventually(lambda: fleet.events["claimed"] == 1)
    stop.set()
    await eventually(lambda: not any(t.name.startswith("claim-") for t in threading.enumerate()))
    # Leases outlive the wait: the heartbeat goes on while the worker drains.
    await fleet.queues.enqueue(BULK, [NewJob("later", codec.pack_call("slow", 2), 1)])
    gate.set()
    assert await waiting == {"n": 1}
    await task
    assert fleet.redis.lrange(keys.queue_list(BULK), 0, -1) == [b"later"]
    assert fleet.redis.smembers("rq:workers") == set()


async def test_a_second_signal_releases_at_once_and_charges_nothing(fleet):
    async def endless(job):
        await asyncio.Event().wait()

    jobs = [NewJob(f"b-{n}", codec.pack_call("endless", n), 10) for n in range(4)]
    await fleet.queues.enqueue(BULK, jobs)
    task, stop, hurry = fleet.start({"endless": One(endless)})
    await eventually(lambda: fleet.redis.zcard(keys.lease(BULK)) == 4)
    stop.set()
    hurry.set()
    await task
    assert fleet.redis.lrange(keys.queue_list(BULK), 0, -1) == [b"b-0", b"b-1", b"b-2", b"b-3"]
    assert fleet.redis.hget(keys.job("b-0"), "vf_attempts") == b"0"
    assert fleet.redis.zcard(keys.lease(BULK)) == 0


async def test_jobs_of_a_dead_worker_are_taken_over(fleet):
    await fleet.queues.enqueue(
        BULK, [NewJob("j-1", codec.pack_call("echo", {"n": 1}), 1)], Route(box=fleet.box.name)
    )
    from vecfleet.worker.ledger import Ask

    dead = Ledger(fleet.redis, "dead", lease_s=0.05)
    future = fleet.box.expect("j-1")
    assert len(dead.claim([Ask(BULK, 1, 99)])) == 1
    fleet.start({"echo": One(echo)})
    assert await fleet.box.wait("j-1", future, 20) == {"got": {"n": 1}}
    await eventually(lambda: fleet.events["rescued"] == 1)  # told after it was done


async def test_a_cancelled_job_is_stopped_in_flight(fleet):
    stopped = asyncio.Event()

    async def endless(job):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.set()
            raise

    await fleet.queues.enqueue(FAST, [NewJob("j-1", codec.pack_call("endless", 1), 1)])
    fleet.start({"endless": One(endless), "echo": One(echo)})
    await eventually(lambda: fleet.events["claimed"] == 1)
    assert await fleet.queues.cancel(["j-1"]) == 1
    async with asyncio.timeout(10):
        await stopped.wait()
    assert (await fleet.ask(2, {}))["got"] == {}


async def test_a_job_whose_caller_went_is_stopped_and_forgotten_once_the_engine_lets_go(fleet):
    began, lets_go = asyncio.Event(), asyncio.Event()
    stops = 0

    async def held(job):
        nonlocal stops
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stops += 1
            await lets_go.wait()
            raise

    await fleet.queues.enqueue(
        FAST, [NewJob("j-1", codec.pack_call("held", 1), 1)], Route(box=fleet.box.name)
    )
    fleet.start({"held": One(held), "echo": One(echo)})
    await began.wait()
    assert await fleet.queues.cancel(["j-1"]) == 1
    await eventually(lambda: fleet.events["lost"] > 2)
    # A step may hold its text: if the worker died of it now, it must be remembered.
    assert fleet.redis.zcard(keys.lease(FAST)) == fleet.redis.exists(keys.job("j-1")) == stops == 1
    lets_go.set()
    await eventually(lambda: not fleet.redis.exists(keys.job("j-1"), keys.lease(FAST)))


async def test_what_was_in_an_engine_that_died_is_suspect_at_once_and_others_take_it(fleet):
    is_ready = True
    ran = []

    async def compute(job):
        nonlocal is_ready
        ran.append((job.id, job.is_suspect))
        # No claim is under way: both lanes wait for their bells, and the box for replies.
        await eventually(lambda: fleet.redis.info("clients")["blocked_clients"] >= 3)
        is_ready = False
        raise EngineDied

    async def enqueue(number):
        future = fleet.box.expect(f"j-{number}")
        job = NewJob(f"j-{number}", codec.pack_call("compute", number), 1)
        await fleet.queues.enqueue(FAST, [job], Route(box=fleet.box.name))
        return future

    first = await enqueue(1)
    fleet.start({"compute": One(compute)}, is_ready=lambda: is_ready)
    await eventually(lambda: fleet.events["rescued"] == 1)  # leases are 10 s, and it still lives
    second = await enqueue(2)
    told = fleet.redis.hmget(keys.job("j-1"), "status", "vf_attempts")
    assert told == [b"queued", b"1"]
    # This worker claims nothing; another one, whose engine lives, takes both over.
    fleet.start({"compute": One(echo)}, name="w2")
    assert await fleet.box.wait("j-1", first, 20) == {"got": 1}
    assert await fleet.box.wait("j-2", second, 20) == {"got": 2}
    assert ran == [("j-1", False)]


async def test_what_came_while_the_engine_started_is_not_charged_and_runs_when_it_is_back(fleet):
    is_ready = False
    attempts = []

    async def compute(job):
        attempts.append(job.attempts)
        if not is_ready:
            raise EngineStarting
        return Answer(job.payload)

    fleet.start({"compute": One(compute)}, is_ready=lambda: is_ready)
    asking = asyncio.create_task(fleet.ask(1, {"n": 1}, function="compute"))
    await eventually(lambda: attempts and fleet.redis.llen(keys.queue_list(FAST)) == 1)
    is_ready = True
    assert await asking == {"n": 1}
    # A claim may be under way when the call finds the engine away: then there are three.
    assert attempts in ([1, 1], [1, 1, 1])


@asynccontextmanager
async def lost_reply():
    """The next reply to a claim that brings jobs is lost on its way."""
    original = redis.connection.AbstractConnection.read_response
    state = {"left": 1}

    def read(self, *args, **kwargs):
        reply = original(self, *args, **kwargs)
        is_claim = isinstance(reply, list) and len(reply) == 3 and isinstance(reply[1], list)
        if state["left"] and is_claim and reply[1]:
            state["left"] = 0
            self.disconnect()
            raise redis.exceptions.ConnectionError("the reply was lost")
        return reply

    redis.connection.AbstractConnection.read_response = read
    try:
        yield state
    finally:
        redis.connection.AbstractConnection.read_response = original


async def test_a_claim_whose_reply_was_lost_is_given_back(fleet):
    async with lost_reply() as state:
        fleet.start({"echo": One(echo)}, lease_s=3600)
        assert await fleet.ask(1, {"n": 1}) == {"got": {"n": 1}}
        assert state["left"] == 0
    await eventually(lambda: fleet.events["reconciled"] == 1)  # told after it was done


async def test_redis_restarting_under_the_worker_loses_nothing(redis_server_factory):
    server = redis_server_factory(append_only=True)
    fleet = Fleet(server.url)
    await fleet.box.open()
    try:
        fleet.start({"echo": One(echo)})
        assert (await fleet.ask(0, {"n": 0}))["got"] == {"n": 0}
        server.stop()
        server.start()
        answer = None

        async def again():
            nonlocal answer
            try:
                answer = await fleet.ask(1, {"n": 1})
            except Exception:
                return False
            return True

        await eventually(again)
        assert answer == {"got": {"n": 1}}
    finally:
        await fleet.close()
