"""Beside a worker's jobs: it shows itself, keeps its leases, and takes over from the dead."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vecfleet.common import keys
from vecfleet.common.errors import RedisUnavailable, VecfleetError
from vecfleet.worker.job import ClaimedJob
from vecfleet.worker.ledger import Announcement, Ledger

log = logging.getLogger(__name__)

_REPORT_S = 2.0
_SWEEP_S = 10.0
_SECOND_LOOK_S = 1.0  # a claim whose reply is on its way has arrived by then

OnEvent = Callable[[str, int], None]  # name of what happened, and to how many jobs


@dataclass(frozen=True, slots=True)
class Timing:
    """How often the worker shows itself, and how long it may take to drain."""

    heartbeat_s: float = keys.HEARTBEAT_S
    rescue_s: float = 1.0
    drain_s: float = 60.0


@dataclass(slots=True)
class Counts:
    """What a worker did since it last reported."""

    succeeded: int = 0
    failed: int = 0
    busy_s: float = 0.0


class Heartbeat:
    """The chores of one worker, in a thread of their own."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        queues: Callable[[], Sequence[keys.QueueName]],
        announce: Callable[[], Announcement],
        timing: Timing,
        jobs: Callable[[], list[ClaimedJob]],
        take_counts: Callable[[], Counts],
        on_lost: Callable[[set[str]], object],
        on_event: OnEvent,
    ) -> None:
        """``jobs`` are in flight; ``on_lost`` hears of executions that are not ours any more."""
        self._ledger = ledger
        self._queues = queues
        self._announce = announce
        self._timing = timing
        self._jobs = jobs
        self._take_counts = take_counts
        self._on_lost = on_lost
        self._on_event = on_event
        self._draining = threading.Event()
        self.lost_reply = threading.Event()  # set: a claim's reply may have been lost

    def run(self, draining: threading.Event, over: threading.Event) -> None:
        """Go on until ``over``; nothing is rescued once ``draining``."""
        self._draining = draining
        beat_at = rescue_at = report_at = sweep_at = 0.0
        has_beaten = False
        pause = min(self._timing.heartbeat_s, self._timing.rescue_s)
        while not over.wait(pause):
            now = time.monotonic()
            try:
                if now >= beat_at:
                    has_beaten = False
                    self.beat()  # before any rescue: our own leases may have run out
                    has_beaten, beat_at = True, now + self._timing.heartbeat_s
                if now >= rescue_at and not draining.is_set():
                    rescue_at = now + self._timing.rescue_s
                    self._rescue()
                if now >= report_at:
                    report_at = now + _REPORT_S
                    self._report()
                if now >= sweep_at:
                    sweep_at = now + _SWEEP_S
                    self._ledger.roster.sweep(self._queues())
                if self.lost_reply.is_set():
                    self._reconcile(over)
            except VecfleetError as error:
                if has_beaten and not isinstance(error, RedisUnavailable):
                    # As on a full Redis, where the heartbeat and the rescue pass.
                    log.warning("Redis refuses a chore beside the heartbeat: %s", error)
                    continue
                log.warning("no heartbeat: %s", error)
                # Nobody could renew a lease: give the others one lease's time to do so.
                rescue_at = time.monotonic() + keys.LEASE_TTL_S
            except Exception:
                log.exception("the heartbeat failed; it goes on")

    def beat(self) -> None:
        """Show the worker and renew the leases of its jobs."""
        jobs = self._jobs()
        says = self._announce()
        state = "busy" if jobs else "idle"
        if self._draining.is_set():
            state = "draining"
        elif says.state:
            state = says.state
        elif says.status.get("paused"):
            state = "paused"
        says = replace(says, status={**says.status, "state": state, "jobs_in_flight": len(jobs)})
        lost = self._ledger.heartbeat(jobs, says)
        if lost:
            self._on_lost(lost)

    def _rescue(self) -> None:
        again, buried = self._ledger.rescue(self._queues())
        if again or buried:
            log.warning("rescued %d jobs of dead workers, buried %d", again, buried)
            self._on_event("rescued", again + buried)

    def _reconcile(self, over: threading.Event) -> None:
        """Give back claims whose reply never reached us.

        A claim may be under way while we look, so only what two looks in a row find is given back.
        """
        self.lost_reply.clear()
        first = {job.execution for job in self._orphans()}
        if first and not over.wait(_SECOND_LOOK_S):
            released = self._ledger.release(j for j in self._orphans() if j.execution in first)
            if released:
                log.warning("gave back %d claims whose reply was lost", released)
                self._on_event("reconciled", released)

    def _orphans(self) -> list[ClaimedJob]:
        return self._ledger.orphans(self._queues(), self._jobs())

    def _report(self) -> None:
        counts = self._take_counts()
        self._ledger.roster.report(
            busy=bool(self._jobs()),
            succeeded=counts.succeeded,
            failed=counts.failed,
            busy_s=counts.busy_s,
        )
