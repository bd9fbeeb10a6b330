"""The life of jobs, driven at random against the real scripts on a real Redis, by a virtual clock.

The model knows of each acknowledged job one place: queued, leased, merged, dead or cancelled. After
every step Redis is read and has to say the same: each job in one place, counters as the jobs add
up to. Who holds a lease goes by the model's clock, which the scripts read in place of Redis's.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from fuzz.found import BLOCKS, EMBED, MERGE, SUB, Found, FoundQueue, look
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from vecfleet.common import codec, keys, queue_client, submission
from vecfleet.common.admission import JOB_BYTES
from vecfleet.common.errors import JobCancelled, JobFailed
from vecfleet.common.queue_client import NewJob, QueueClient, Route
from vecfleet.common.redis_client import connect, connect_async, read_lua
from vecfleet.common.submission import Submissions
from vecfleet.worker import ledger as ledger_module
from vecfleet.worker.job import ClaimedJob, Commit, Failure, HandOn, Release, Settlement
from vecfleet.worker.ledger import Announcement, Ask, Ledger

LEASE_S = 10.0
DOCUMENTS = 3
_SECONDS, _MICROSECONDS = "test:clock:s", "test:clock:us"
_CLOCK = (
    f"{{tonumber(redis.call('GET', '{_SECONDS}')), tonumber(redis.call('GET', '{_MICROSECONDS}'))}}"
)
_TIME = "redis.call('TIME')"
WORKERS = ("w1", "w2", "w3")


@contextmanager
def virtual_time(mutant: tuple[str, str]) -> Iterator[None]:
    """Every script that is read inside goes by a clock that stands in two keys.

    ``mutant``: a piece of the scripts and what to put in its place, to see the machine fail.
    """
    assert _TIME in read_lua(Path(ledger_module.__file__).parent, "ledger")

    def on_virtual_time(directory: Path, *names: str) -> str:
        return read_lua(directory, *names).replace(_TIME, _CLOCK).replace(*mutant)

    with (
        mock.patch.object(ledger_module, "read_lua", on_virtual_time),
        mock.patch.object(queue_client, "read_lua", on_virtual_time),
        mock.patch.object(submission, "read_lua", on_virtual_time),
    ):
        yield


@dataclass
class Held:
    """A claim as its worker knows it, whether or not it is still good."""

    worker: str
    job: ClaimedJob
    expires_ms: int
    is_remembered: bool = True  # not any more once its worker has crashed or let it go


@dataclass
class Model:
    """What is true."""

    now_ms: int = 1_700_000_000_000
    state: dict[str, str] = field(default_factory=dict)  # queued:Q, leased:Q, merged, dead, ...
    holder: dict[str, str] = field(default_factory=dict)  # job -> execution that may settle
    sub_state: str = "open"


class JobMachine(RuleBasedStateMachine):
    """Enqueue, claim, heartbeat, expire, settle, merge, release, cancel, crash."""

    url = ""  # of an empty Redis
    mutant = ("", "")
    ends: ClassVar[Counter[str]] = Counter()  # how jobs ended, over all runs

    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.client = connect(self.url)
        self.client.flushall()
        self.loop = asyncio.new_event_loop()
        self.async_client = connect_async(self.url)
        with virtual_time(self.mutant):
            self.ledgers = {name: Ledger(self.client, name, lease_s=LEASE_S) for name in WORKERS}
            self.queues = QueueClient(self.async_client)
            self.submissions = Submissions(self.async_client)
        self.model = Model()
        self.made: list[Held] = []
        self.tick(0)
        self.run(self.submissions.open(SUB, tenant="-", collection="c", uid="c0ffee"))

    def teardown(self) -> None:
        self.ends.update(state.partition(":")[0] for state in self.model.state.values())
        self.run(self.async_client.aclose())
        self.loop.close()
        self.client.close()

    def shard_of(self, held: Held) -> bytes:
        """What a block becomes."""
        return b"shard"

    def commit(self, held: Held) -> None:
        """What precedes the settlement of a merge."""

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def tick(self, ms: int) -> None:
        self.model.now_ms += ms
        seconds, rest = divmod(self.model.now_ms, 1000)
        self.client.mset({_SECONDS: seconds, _MICROSECONDS: rest * 1000})

    # What may happen

    @initialize()
    def begin(self) -> None:
        self.enqueue(set(range(BLOCKS // 2)))

    @rule(blocks=st.sets(st.integers(0, BLOCKS - 1), min_size=1, max_size=4))
    def enqueue(self, blocks: set[int]) -> None:
        jobs = [
            NewJob(f"{SUB}-{n}", codec.pack_call("vecfleet.embed", {"n": n}), 5 + n, n, DOCUMENTS)
            for n in sorted(blocks)
        ]
        route = Route(submission=SUB, merge_queue=str(MERGE), version_uid="c0ffee")
        try:
            admitted = self.run(self.queues.enqueue(EMBED, jobs, route))
        except JobCancelled:
            assert self.model.sub_state == "cancelled"
            return
        for job, number in zip(jobs, admitted.numbers, strict=True):
            known = self.model.state.get(job.id)
            if known in (None, "cancelled"):
                assert number > 0, (job.id, known, number)
                self.model.state[job.id] = f"queued:{EMBED}"
            else:  # the same job again changes nothing, and is told apart
                wanted = {"merged": -2, "dead": -3}.get(known, -1)
                assert number == wanted, (job.id, known, number)

    @rule(
        target=claims,
        worker=st.sampled_from(WORKERS),
        queue=st.sampled_from((EMBED, MERGE)),
        most=st.sampled_from((1, 2, 4, BLOCKS)),
    )
    def claim(self, worker: str, queue: keys.QueueName, most: int) -> Any:
        claimed = self.ledgers[worker].claim([Ask(queue, most, 1000)])
        assert len(claimed) <= most
        made = []
        for job in claimed:
            assert self.model.state[job.id] == f"queued:{queue}", (job.id, self.model.state)
            self.model.state[job.id] = f"leased:{queue}"
            self.model.holder[job.id] = job.execution
            made.append(Held(worker, job, self.model.now_ms + int(LEASE_S * 1000)))
        self.made += made
        return multiple(*made)

    @rule(worker=st.sampled_from(WORKERS))
    def heartbeat(self, worker: str) -> None:
        mine = self.remembered(worker)
        lost = self.ledgers[worker].heartbeat([held.job for held in mine], Announcement())
        assert lost == {held.job.execution for held in mine if not self.holds(held)}
        for held in mine:
            held.expires_ms = self.model.now_ms + int(LEASE_S * 1000)
            held.is_remembered = held.job.execution not in lost

    @rule(ms=st.sampled_from((4000, 9999, 10_001)))
    def time_passes(self, ms: int) -> None:
        self.tick(ms)

    @rule(worker=st.sampled_from(WORKERS), queue=st.sampled_from((EMBED, MERGE)))
    def expire(self, worker: str, queue: keys.QueueName) -> None:
        due = [
            held
            for held in self.held_now()
            if held.job.queue == queue and held.expires_ms <= self.model.now_ms
        ]
        again, buried = self.ledgers[worker].rescue([queue])
        assert again + buried == len(due), (again, buried, due)
        found = Counter()
        for held in due:
            status = self.client.hget(keys.job(held.job.id), "status")
            found[status] += 1
            assert status != b"failed" or held.job.attempts >= 2
            self.model.state[held.job.id] = "dead" if status == b"failed" else f"queued:{queue}"
            del self.model.holder[held.job.id]
        assert (found[b"queued"], found[b"failed"]) == (again, buried)

    @rule(
        held=consumes(claims),
        kind=st.sampled_from(("good", "good", "good", "fail", "release")),
        twice=st.booleans(),
    )
    def settle(self, held: Held, kind: str, twice: bool) -> None:
        """Whoever claimed it at any time: only the holder of the lease succeeds, and once."""
        outcome: Any = Release()
        if kind == "fail":
            outcome = Failure(JobFailed("no"))
        elif kind == "good" and held.job.queue == EMBED:
            data = codec.pack_call("vecfleet.merge", self.shard_of(held))
            outcome = HandOn(str(MERGE), data, DOCUMENTS)
        elif kind == "good":
            self.commit(held)
            outcome = Commit(DOCUMENTS, {})
        batch = [Settlement(held.job, outcome)] * (2 if twice else 1)
        settled = self.ledgers[held.worker].settle(batch)
        assert settled == [self.holds(held), False][: len(batch)]
        if settled[0]:
            del self.model.holder[held.job.id]
            self.model.state[held.job.id] = {
                "fail": "dead",
                "release": f"queued:{held.job.queue}",
                "good": f"queued:{MERGE}" if held.job.queue == EMBED else "merged",
            }[kind]
        held.is_remembered = False

    @rule(worker=st.sampled_from(WORKERS), queue=st.sampled_from((EMBED, MERGE)))
    def work(self, worker: str, queue: keys.QueueName) -> None:
        """What happens when nothing goes wrong."""
        made = self.claim(worker, queue, 2)
        for held in made.values:
            self.settle(held, "good", False)

    @rule(worker=st.sampled_from(WORKERS))
    def drain(self, worker: str) -> None:
        mine = self.remembered(worker)
        good = [held for held in mine if self.holds(held)]
        assert self.ledgers[worker].release([held.job for held in mine]) == len(good)
        for held in good:
            del self.model.holder[held.job.id]
            self.model.state[held.job.id] = f"queued:{held.job.queue}"
        for held in mine:
            held.is_remembered = False

    @rule(block=st.integers(0, BLOCKS - 1))
    def cancel(self, block: int) -> None:
        job = f"{SUB}-{block}"
        state = self.model.state.get(job, "")
        there = state.startswith(("queued", "leased"))
        assert self.run(self.queues.cancel([job])) == there
        if there:
            self.model.state[job] = "cancelled"
            self.model.holder.pop(job, None)

    @rule(worker=st.sampled_from(WORKERS))
    def crash(self, worker: str) -> None:
        """It forgets what it holds; as a zombie it may still settle what is in the bundle."""
        for held in self.remembered(worker):
            held.is_remembered = False

    # What must always be so

    @invariant()
    def redis_says_the_same(self) -> None:
        found = look(self.client)
        self.each_job_is_in_one_place(found)
        for name, queue in found.queues.items():
            self.counters_are_what_the_jobs_add_up_to(name, queue, found)
        self.the_submission_counts_each_block_once(found)

    def each_job_is_in_one_place(self, found: Found) -> None:
        places: dict[str, list[str]] = {job: [] for job in self.model.state}
        for name, queue in found.queues.items():
            # Of a job that was cancelled an id stays behind, also when it is enqueued again.
            for job in {raw.decode() for raw in queue.waiting}:
                if found.jobs[job].fields[:2] == [b"queued", name.encode()]:
                    places[job].append(f"queued:{name}")
            for raw in queue.leases:
                job, _, execution = raw.decode().partition(":")
                places[job].append(f"leased:{name}")
                assert self.model.holder.get(job) == execution
            for raw in queue.dead:
                places[raw.decode()].append("dead")
                assert found.jobs[raw.decode()].size
        for job, state in self.model.state.items():
            known = found.jobs[job].is_there
            if state in ("merged", "cancelled"):
                assert not known and not places[job], (job, state, places[job])
            else:
                assert known and places[job] == [state], (job, state, places[job])

    def counters_are_what_the_jobs_add_up_to(
        self, name: str, queue: FoundQueue, found: Found
    ) -> None:
        waiting = [
            found.jobs[job] for job, state in self.model.state.items() if state == f"queued:{name}"
        ]
        sums = {
            b"tokens": sum(int(job.fields[2] or 0) for job in waiting),
            b"bytes": sum(job.size + JOB_BYTES for job in waiting),
            b"jobs": len(waiting),
        }
        assert {key: int(queue.load.get(key, 0)) for key in sums} == sums, (name, queue.load)
        # There is one tenant, so what waits for all is the same.
        assert {key: int(queue.of_all.get(key, 0)) for key in sums} == sums, (name, queue.of_all)
        # Ids of cancelled jobs stay in the list, until somebody comes to them.
        has_line = bool(queue.waiting) and name == str(EMBED)
        assert queue.line == [name.encode()] * has_line, (name, queue.line)
        if not queue.waiting:
            assert not queue.load and not queue.of_all, (name, queue)

    def the_submission_counts_each_block_once(self, found: Found) -> None:
        for bits, state in ((found.merged, "merged"), (found.dead, "dead")):
            for block in range(BLOCKS):
                bit = bits[block // 8] >> (7 - block % 8) & 1 if block // 8 < len(bits) else 0
                assert bit == (self.model.state.get(f"{SUB}-{block}") == state), (state, block)
        told = found.submission
        ends = Counter(self.model.state.values())
        assert int(told.get(b"committed_documents", 0)) == DOCUMENTS * ends["merged"]
        assert int(told.get(b"failed_documents", 0)) == DOCUMENTS * ends["dead"]

    def holds(self, held: Held) -> bool:
        return self.model.holder.get(held.job.id) == held.job.execution

    def held_now(self) -> list[Held]:
        """Every claim that is good, also those that their worker has forgotten."""
        return [held for held in self.made if self.holds(held)]

    def remembered(self, worker: str) -> list[Held]:
        """The claims that a worker believes to have."""
        return [held for held in self.made if held.worker == worker and held.is_remembered]
