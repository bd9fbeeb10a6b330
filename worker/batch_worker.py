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
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from vecfleet.common import keys
from vecfleet.common.errors import (
    EngineBroken,
    EngineDied,
    EngineFailed,
    EngineStarting,
    InvalidInput,
    JobCancelled,
    QueueFull,
    RedisUnavailable,
    VecfleetError,
)
from vecfleet.worker.handlers import Direct, Handlers, Many, One
from vecfleet.worker.heartbeat import Counts, Heartbeat, OnEvent, Timing
from vecfleet.worker.job import (
    Abandoned,
    Answer,
    ClaimedJob,
    Failure,
    HandOn,
    Outcome,
    Release,
    Settlement,
)
from vecfleet.worker.ledger import Announcement, Ask, Ledger
from vecfleet.worker.quarantine import Quarantine
from vecfleet.worker.window import Window

log = logging.getLogger(__name__)

_BELL_WAIT_S = 1.0  # a lost wake-up costs at most this
_ROOM_WAIT_S = 0.5
_AWAY_S = 0.2
_RETRY_S = (0.1, 0.2, 0.5, 1.0, 2.0)
_SETTLE_JOBS = 128
_SETTLE_BYTES = 2 << 20  # Redis does nothing else meanwhile: a few milliseconds


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
        self._is_ready = is_ready
        self._running: dict[str, _Running] = {}  # by execution; the loop's thread writes
        self._outcomes: queue.SimpleQueue[Settlement | None] = queue.SimpleQueue()
        self._rests_until: dict[keys.QueueName, float] = {}  # time.monotonic
        self._stopping = threading.Event()
        self._engine_is_away = threading.Event()
        self._over = threading.Event()
        self._idle: asyncio.Event = asyncio.Event()
        self._quarantine = quarantine or Quarantine(ledger, windows)
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

    async def run(self, stop: asyncio.Event, *, hurry: asyncio.Event | None = None) -> None:
        """Work until ``stop``; then finish what is in flight and leave.

        What is not finished within the drain time, or once ``hurry`` is set, is released.
        """
        self._loop = asyncio.get_running_loop()
        self._idle.set()
        registered = list(self._queues())
        await asyncio.to_thread(self._ledger.roster.register, registered)
        await asyncio.to_thread(self._heartbeat.beat)
        threads = [
            *(
                threading.Thread(target=self._claim_loop, args=(lane,), name=f"claim-{lane}")
                for lane in self._windows
            ),
            threading.Thread(target=self._settle_loop, name="settle"),
            threading.Thread(
                target=self._heartbeat.run, args=(self._stopping, self._over), name="heartbeat"
            ),
        ]
        for thread in threads:
            thread.start()
        self._on_event("ready", 0)
        try:
            await stop.wait()
        finally:
            await self._drain(threads, hurry or asyncio.Event())
            await asyncio.to_thread(self._leave, registered)
        self._on_event("stopped", 0)

    # Claiming

    def _claim_loop(self, lane: keys.Lane) -> None:
        window = self._windows[lane]
        retries = turn = 0
        needs_calm = False  # a suspect waits until nothing of this lane is in flight
        while not self._stopping.is_set():
            if not self._has_engine():
                self._stopping.wait(_AWAY_S)
                continue
            if needs_calm and not window.wait_until_empty(_ROOM_WAIT_S):
                continue
            if window.wait_for_room(_ROOM_WAIT_S) is None:
                continue
            mine = [name for name in self._queues() if name.lane == lane and not self._rests(name)]
            turn = turn + 1 if turn < len(mine) - 1 else 0
            mine = mine[turn:] + mine[:turn]  # what is first has the first right to the room
            try:
                with self._quarantine.claiming(lane, _ROOM_WAIT_S) as may:
                    if not may:
                        continue
                    jobs, needs_calm = self._claim(mine, window)
                    self._take(jobs, window)
                self._begin(jobs)
                if not jobs and not needs_calm:
                    self._wait(mine)
                retries = 0
            except Exception as error:
                # Redis is away, or refuses for a while (read-only, no replicas): the thread must
                # outlive whatever it is.
                self._heartbeat.lost_reply.set()
                self._pause(error, retries)
                retries += 1

    def _has_engine(self) -> bool:
        """Whether there is an engine to claim for; asked only once a call has found it away."""
        if self._engine_is_away.is_set() and self._is_ready():
            self._engine_is_away.clear()
        return not self._engine_is_away.is_set()

    def _claim(
        self, mine: Sequence[keys.QueueName], window: Window
    ) -> tuple[list[ClaimedJob], bool]:
        room = window.room()
        if room is None:
            return [], False
        is_alone = window.in_flight[0] == 0
        return self._ledger.claim_or_wait(
            [Ask(name, room.jobs, room.tokens, room.bytes, is_alone) for name in mine]
        )

    def _rests(self, name: keys.QueueName) -> bool:
        return time.monotonic() < self._rests_until.get(name, 0.0)

    def _take(self, jobs: Sequence[ClaimedJob], window: Window) -> None:
        for job in jobs:
            window.take(job.tokens, job.size)
        self._quarantine.take(jobs)

    def _wait(self, mine: Sequence[keys.QueueName]) -> None:
        if mine:
            self._ledger.wait(mine, _BELL_WAIT_S)
        else:
            self._stopping.wait(_BELL_WAIT_S)

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
        except Exception as error:
            batch = [Settlement(job, Failure(_as_ours(error, job))) for job in jobs]
        try:
            self._tell_settled(batch, self._ledger.settle(batch))
        except Exception:
            for settlement in batch:  # again, by the thread that has the patience
                self._outcomes.put(settlement)

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
            self._engine_is_away.set()
            outcome = Abandoned()
        except EngineStarting:
            self._engine_is_away.set()
            outcome = Release()
        except EngineBroken as error:
            # Kept until the drain releases it: the job is not at fault, and is not charged.
            log.error("%s", error)
            self._on_broken()
            return
        except Exception as error:
            outcome = Failure(_as_ours(error, job))
        self._finish(job, outcome)

    async def _run_many(self, handler: Many, jobs: Sequence[ClaimedJob]) -> None:
        try:
            batch = _paired(jobs, await handler.run(jobs))
        except asyncio.CancelledError:
            for job in jobs:
                self._drop(job)
            raise
        except Exception as error:
            batch = [Settlement(job, Failure(_as_ours(error, job))) for job in jobs]
        for settlement in batch:
            self._finish(settlement.job, settlement.outcome)

    def _finish(self, job: ClaimedJob, outcome: Outcome) -> None:
        if isinstance(outcome, Release) and outcome.rest_s:
            self._rests_until[job.queue] = time.monotonic() + outcome.rest_s
        self._outcomes.put(Settlement(job, outcome))

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

    # Settling

    def _settle_loop(self) -> None:
        while True:
            first = self._outcomes.get()
            if first is None:
                return
            batch, ended = self._gather(first)
            self._settle(batch)
            if ended:
                return

    def _gather(self, first: Settlement) -> tuple[list[Settlement], bool]:
        """All that is there, up to a size that does not hold Redis up."""
        batch, size = [first], _size(first)
        while len(batch) < _SETTLE_JOBS and size < _SETTLE_BYTES:
            try:
                another = self._outcomes.get_nowait()
            except queue.Empty:
                break
            if another is None:
                return batch, True
            batch.append(another)
            size += _size(another)
        return batch, False

    def _settle(self, batch: Sequence[Settlement]) -> None:
        """Settle until Redis has answered; the fence makes a second try harmless."""
        retries = 0
        while True:
            try:
                settled = self._ledger.settle(batch)
                break
            except (RedisUnavailable, QueueFull) as error:
                if self._over.is_set():
                    return
                self._pause(error, retries)
                retries += 1
            except Exception:
                log.exception("cannot settle; the leases run out and others take the jobs over")
                settled = [False] * len(batch)
                break
        self._tell_settled(batch, settled)

    def _tell_settled(self, batch: Sequence[Settlement], settled: Sequence[bool]) -> None:
        for settlement, done in zip(batch, settled, strict=True):
            if not done:
                log.warning("job %s was cancelled or taken over", settlement.job.id)
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

    def _pause(self, error: Exception, retries: int) -> None:
        log.warning("%s", error)
        self._over.wait(_RETRY_S[min(retries, len(_RETRY_S) - 1)])

    # Leaving

    async def _drain(self, threads: Iterable[threading.Thread], hurry: asyncio.Event) -> None:
        """Claim nothing more, finish what runs, release the rest; leases live until then."""
        self._stopping.set()
        claimers = [thread for thread in threads if thread.name.startswith("claim-")]
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
        self._outcomes.put(None)
        for thread in threads:
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


def _as_ours(error: Exception, job: ClaimedJob) -> VecfleetError:
    if isinstance(error, VecfleetError):
        return error
    if isinstance(error, TimeoutError):
        return JobCancelled(f"the job ran longer than {job.timeout_s:g} s")
    log.error("job %s of %s failed", job.id, job.queue, exc_info=error)
    return EngineFailed(f"{type(error).__name__}: {error}")


def _size(settlement: Settlement) -> int:
    """Roughly how many bytes of an outcome go to Redis."""
    match settlement.outcome:
        case HandOn(data=data):
            return len(data)
        case Answer(body=dict() as body, size=size):
            return size + len(body.get("vectors", b""))
        case _:
            return 0
