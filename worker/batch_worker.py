"""The worker: claims jobs in batches, runs them on one event loop, settles them in batches.

Four threads talk to Redis, so that none waits for another: a claimer for each lane, the settler,
and the heartbeat, which also rescues. The event loop (the caller's thread) owns the engine. A
claimer that finds nothing blocks on its queues' bells; credits (worker/window.py) bound what is
in flight, so a lane without credit claims nothing and the other lane goes on.

   claimer ──claimed──► loop: handler ──outcome──► settler
      ▲                                               │
      └───────────────── credits ◄────────────────────┘
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from vecfleet.common import keys
from vecfleet.common.errors import (
    EngineBroken,
    EngineDied,
    EngineStarting,
    InvalidInput,
    JobCancelled,
    JobFailed,
    RedisUnavailable,
    VecfleetError,
)
from vecfleet.worker.claimer import Claimer, EngineGate
from vecfleet.worker.handlers import Direct, Handlers, Many, One
from vecfleet.worker.heartbeat import Counts, Heartbeat, OnEvent, Timing
from vecfleet.worker.job import (
    Abandoned,
    Answer,
    ClaimedJob,
    Failure,
    Outcome,
    Release,
    Settlement,
)
from vecfleet.worker.ledger import Announcement, Ledger
from vecfleet.worker.quarantine import Quarantine
from vecfleet.worker.settler import Settler
from vecfleet.worker.window import Window

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Running:
    job: ClaimedJob
    task: asyncio.Task[None] | None = None
    is_stopped: bool = False


class BatchWorker:
    """Runs the jobs of some queues with the handlers of an allow-list."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        queues: Callable[[], Sequence[keys.QueueName]],
        handlers: Handlers,
        windows: Mapping[keys.Lane, Window],
        announce: Callable[[], Announcement],
        timing: Timing | None = None,
        on_event: OnEvent | None = None,
        on_broken: Callable[[], None] | None = None,
        is_ready: Callable[[], bool] = lambda: True,
        quarantine: Quarantine | None = None,
    ) -> None:
        """``on_broken`` is called when the engine can do nothing any more: the worker must end.

        ``is_ready`` tells, after a call found the engine away, whether it is back: until then
        nothing is claimed. ``queues`` is asked before every claim: an aggregator's queues come and
        go. ``quarantine`` is the one that the handlers know, where they do.
        """
        self._ledger = ledger
        self._queues = queues
        self._handlers = handlers
        self._windows = windows
        self._announce = announce
        self._timing = timing or Timing()
        self._on_event = on_event or (lambda name, count: None)
        self._on_broken = on_broken or (lambda: None)
        self._running: dict[str, _Running] = {}  # by execution; the loop's thread writes
        self._stopping = threading.Event()
        self._over = threading.Event()
        self._idle: asyncio.Event = asyncio.Event()
        self._quarantine = quarantine or Quarantine(ledger, windows)
        self._gate = EngineGate(is_ready)
        self._busy_since: float | None = None
        self._counts = Counts()
        self._heartbeat = Heartbeat(
            ledger,
            queues=queues,
            announce=announce,
            timing=self._timing,
            jobs=lambda: [running.job for running in list(self._running.values())],
            take_counts=self._take_counts,
            on_lost=lambda lost: self._loop.call_soon_threadsafe(self._abort, lost),
            on_event=self._on_event,
        )
        self._settler = Settler(ledger, self._on_settled, self._over)
        self._claimers = {
            lane: Claimer(
                lane,
                window,
                ledger=ledger,
                queues=queues,
                quarantine=self._quarantine,
                gate=self._gate,
                begin=self._begin,
                on_trouble=self._heartbeat.lost_reply.set,
                stopping=self._stopping,
                over=self._over,
            )
            for lane, window in windows.items()
        }

    async def run(self, stop: asyncio.Event, *, hurry: asyncio.Event | None = None) -> None:
        """Work until ``stop``; then finish what is in flight and leave.

        What is not finished within the drain time, or once ``hurry`` is set, is released.
        """
        self._loop = asyncio.get_running_loop()
        self._idle.set()
        registered = list(self._queues())
        await asyncio.to_thread(self._ledger.roster.register, registered)
        await asyncio.to_thread(self._heartbeat.beat)
        claimers = [
            threading.Thread(target=claimer.run, name=f"claim-{lane}")
            for lane, claimer in self._claimers.items()
        ]
        others = [
            threading.Thread(target=self._settler.run, name="settle"),
            threading.Thread(
                target=self._heartbeat.run, args=(self._stopping, self._over), name="heartbeat"
            ),
        ]
        for thread in claimers + others:
            thread.start()
        self._on_event("ready", 0)
        try:
            await stop.wait()
        finally:
            await self._drain(claimers, others, hurry or asyncio.Event())
            await asyncio.to_thread(self._leave, registered)
        self._on_event("stopped", 0)

    # Executing

    def _begin(self, jobs: Sequence[ClaimedJob]) -> None:
        """Start claimed jobs on the loop's thread, but run direct ones here."""
        direct: dict[str, list[ClaimedJob]] = {}
        others: list[ClaimedJob] = []
        for job in jobs:
            if isinstance(self._handlers.get(job.function), Direct):
                direct.setdefault(job.function, []).append(job)
            else:
                others.append(job)
        if others:
            self._loop.call_soon_threadsafe(self._start, others)
        for function, group in direct.items():
            handler = self._handlers[function]
            assert isinstance(handler, Direct)
            self._run_directly(handler, group)

    def _run_directly(self, handler: Direct, jobs: Sequence[ClaimedJob]) -> None:
        self._loop.call_soon_threadsafe(self._note_started, jobs)
        try:
            batch = _paired(jobs, handler.run(jobs))
        except BaseException as error:  # whatever it is, the thread goes on
            batch = [Settlement(job, Failure(_as_ours(error, job))) for job in jobs]
        self._settler.settle_now(batch)

    def _note_started(self, jobs: Sequence[ClaimedJob]) -> None:
        """Count jobs as running, on the loop's thread."""
        self._on_event("claimed", len(jobs))
        if self._busy_since is None:
            self._busy_since = time.monotonic()
        self._idle.clear()
        for job in jobs:
            self._running[job.execution] = _Running(job)

    def _start(self, jobs: Sequence[ClaimedJob]) -> None:
        """Begin claimed jobs, on the loop's thread."""
        self._note_started(jobs)
        together: dict[str, list[ClaimedJob]] = {}
        for job in jobs:
            handler = self._handlers.get(job.function)
            if isinstance(handler, Many):
                together.setdefault(job.function, []).append(job)
            elif isinstance(handler, One):
                self._spawn([job], self._run_one(handler, job))
            else:
                self._finish(job, Failure(_refusal(job)))
        for function, group in together.items():
            handler = self._handlers[function]
            assert isinstance(handler, Many)
            self._spawn(group, self._run_many(handler, group))

    def _spawn(self, jobs: Sequence[ClaimedJob], work: object) -> None:
        task: asyncio.Task[None] = self._loop.create_task(work)  # type: ignore[arg-type]
        for job in jobs:
            self._running[job.execution].task = task

    async def _run_one(self, handler: One, job: ClaimedJob) -> None:
        try:
            async with asyncio.timeout(job.timeout_s):
                outcome: Outcome = await handler.run(job)
        except asyncio.CancelledError:
            self._stop(job)
            raise
        except EngineDied:
            self._gate.close()
            outcome = Abandoned()
        except EngineStarting:
            self._gate.close()
            outcome = Release()
        except EngineBroken as error:
            # Kept until the drain releases it: the job is not at fault, and is not charged.
            log.error("%s", error)
            self._on_broken()
            return
        except (KeyboardInterrupt, SystemExit):
            raise  # the process ends
        except BaseException as error:  # also a panic of a library in Rust, which is no Exception
            outcome = Failure(_as_ours(error, job))
        self._finish(job, outcome)

    async def _run_many(self, handler: Many, jobs: Sequence[ClaimedJob]) -> None:
        try:
            batch = _paired(jobs, await handler.run(jobs))
        except asyncio.CancelledError:
            for job in jobs:
                self._drop(job)
            raise
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            batch = [Settlement(job, Failure(_as_ours(error, job))) for job in jobs]
        for settlement in batch:
            self._finish(settlement.job, settlement.outcome)

    def _finish(self, job: ClaimedJob, outcome: Outcome) -> None:
        if isinstance(outcome, Release) and outcome.rest_s:
            self._claimers[job.queue.lane].rest(job.queue, outcome.rest_s)
        self._settler.put(Settlement(job, outcome))

    def _stop(self, job: ClaimedJob) -> None:
        """It was cancelled. One that nobody waits for any more is ours to forget, in Redis too."""
        running = self._running.get(job.execution)
        if running is not None and running.is_stopped:
            self._finish(replace(job, box=""), Answer(None))
        else:
            self._drop(job)

    def _drop(self, job: ClaimedJob) -> None:
        """Forget a job that is not ours any more; there is nothing to settle."""
        if self._running.pop(job.execution, None) is not None:
            self._give_back(job)
            self._note_idle()

    def _give_back(self, job: ClaimedJob) -> None:
        self._quarantine.give_back(job)
        self._windows[job.queue.lane].give_back(job.tokens, job.size)

    def _take_counts(self) -> Counts:
        """What was done since the last call."""
        counts, self._counts = self._counts, Counts()
        return counts

    def _note_idle(self) -> None:
        if self._running:
            return
        if self._busy_since is not None:
            self._counts.busy_s += time.monotonic() - self._busy_since
            self._busy_since = None
        self._idle.set()

    # Settled

    def _on_settled(self, batch: Sequence[Settlement], settled: Sequence[bool]) -> None:
        """From whichever thread settled."""
        self._loop.call_soon_threadsafe(self._settled, batch, settled)

    def _settled(self, batch: Sequence[Settlement], settled: Sequence[bool]) -> None:
        for settlement, done in zip(batch, settled, strict=True):
            job = settlement.job
            if self._running.pop(job.execution, None) is not None:
                self._give_back(job)
            if isinstance(settlement.outcome, Failure):
                self._counts.failed += done
            elif not isinstance(settlement.outcome, Release | Abandoned):
                self._counts.succeeded += done
        self._note_idle()
        self._on_event("settled", sum(settled))

    # What others take away

    def _abort(self, lost: set[str]) -> None:
        """Stop working on jobs that were cancelled or taken over.

        Once: the engine ends a cancelled call when it has let go of its texts.
        """
        for running in list(self._running.values()):
            single = isinstance(self._handlers.get(running.job.function), One)
            if running.job.execution not in lost or running.is_stopped:
                continue
            if single and running.task is not None:
                running.is_stopped = True
                running.task.cancel()
        self._on_event("lost", len(lost))

    # Leaving

    async def _drain(
        self,
        claimers: Sequence[threading.Thread],
        others: Sequence[threading.Thread],
        hurry: asyncio.Event,
    ) -> None:
        """Claim nothing more, finish what runs, release the rest; leases live until then."""
        self._stopping.set()
        for thread in claimers:
            await asyncio.to_thread(thread.join)
        hurried = asyncio.create_task(hurry.wait())
        idle = asyncio.create_task(self._idle.wait())
        await asyncio.wait(
            (hurried, idle), timeout=self._timing.drain_s, return_when=asyncio.FIRST_COMPLETED
        )
        hurried.cancel()
        idle.cancel()
        left = [running.job for running in self._running.values()]
        for running in list(self._running.values()):
            if running.task is not None:
                running.task.cancel()
        self._over.set()
        self._settler.close()
        for thread in others:
            await asyncio.to_thread(thread.join)
        if left:
            released = await asyncio.to_thread(self._ledger.release, left)
            log.warning("released %d unfinished jobs", released)
            self._on_event("released", released)

    def _leave(self, queues: Sequence[keys.QueueName]) -> None:
        try:
            self._ledger.roster.unregister(queues, self._announce().pools)
        except RedisUnavailable as error:
            log.warning("could not say goodbye: %s", error)


def _paired(jobs: Sequence[ClaimedJob], outcomes: Sequence[Outcome]) -> list[Settlement]:
    """Each job with its outcome; raises ``ValueError`` where a handler gave too few or many."""
    return [Settlement(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True)]


def _refusal(job: ClaimedJob) -> VecfleetError:
    if job.error is not None:
        return job.error
    return InvalidInput(f"this worker runs no function {job.function!r}", field="function")


def _as_ours(error: BaseException, job: ClaimedJob) -> VecfleetError:
    if isinstance(error, VecfleetError):
        return error
    if isinstance(error, TimeoutError):
        return JobCancelled(f"the job ran longer than {job.timeout_s:g} s")
    log.error("job %s of %s failed", job.id, job.queue, exc_info=error)
    return JobFailed(f"{type(error).__name__}: {error}")
