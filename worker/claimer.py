"""Claiming for one lane: what there is room for, from whichever of its queues has the turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from vecfleet.common import keys
from vecfleet.worker.job import ClaimedJob
from vecfleet.worker.ledger import Ask, Ledger
from vecfleet.worker.patience import Patience
from vecfleet.worker.quarantine import Quarantine
from vecfleet.worker.queue_turns import QueueTurns
from vecfleet.worker.window import Window

_BELL_WAIT_S = 1.0  # a lost wake-up costs at most this
_ROOM_WAIT_S = 0.5
_AWAY_S = 0.2


class EngineGate:
    """Whether there is an engine to claim for."""

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        """``is_ready`` is asked only once a call has found the engine away."""
        self._is_ready = is_ready
        self._is_away = threading.Event()

    def close(self) -> None:
        """A call has found it away."""
        self._is_away.set()

    def is_open(self) -> bool:
        """Whether it is there, or back."""
        if self._is_away.is_set() and self._is_ready():
            self._is_away.clear()
        return not self._is_away.is_set()


class Claimer:
    """Claims until it is told to stop; ``run`` is a thread of its own."""

    def __init__(
        self,
        lane: keys.Lane,
        window: Window,
        *,
        ledger: Ledger,
        queues: Callable[[], Sequence[keys.QueueName]],
        quarantine: Quarantine,
        gate: EngineGate,
        begin: Callable[[Sequence[ClaimedJob]], None],
        on_trouble: Callable[[], None],
        stopping: threading.Event,
        over: threading.Event,
    ) -> None:
        """``begin`` gets what was claimed. ``on_trouble``: a claim's reply may have been lost."""
        self._lane = lane
        self._window = window
        self._ledger = ledger
        self._queues = queues
        self._quarantine = quarantine
        self._gate = gate
        self._begin = begin
        self._on_trouble = on_trouble
        self._stopping = stopping
        self._patience = Patience(over)
        self._rests_until: dict[keys.QueueName, float] = {}  # time.monotonic
        self._turns = QueueTurns()
        self._needs_calm = False  # a suspect waits until nothing of this lane is in flight

    def rest(self, name: keys.QueueName, seconds: float) -> None:
        """Claim nothing from a queue for a while; from any thread."""
        self._rests_until[name] = time.monotonic() + seconds

    def run(self) -> None:
        """Claim until ``stopping``."""
        while not self._stopping.is_set():
            if not self._gate.is_open():
                self._stopping.wait(_AWAY_S)
            elif self._has_room():
                self._claim_once()

    def _has_room(self) -> bool:
        if self._needs_calm and not self._window.wait_until_empty(_ROOM_WAIT_S):
            return False
        return self._window.wait_for_room(_ROOM_WAIT_S) is not None

    def _claim_once(self) -> None:
        mine = self._by_turns()
        try:
            with self._quarantine.claiming(self._lane, _ROOM_WAIT_S) as may:
                if not may:
                    return
                jobs = self._claim(mine)
            self._begin(jobs)
            if not jobs and not self._needs_calm:
                self._wait(mine)
            self._patience.renew()
        except Exception as error:
            # Redis is away, or refuses for a while (read-only, no replicas): the thread must
            # outlive whatever it is.
            self._on_trouble()
            self._patience.wait(error)

    def _by_turns(self) -> list[keys.QueueName]:
        """The queues that do not rest; what is first has the first right to the room."""
        now = time.monotonic()
        mine = [
            name
            for name in self._queues()
            if name.lane == self._lane and now >= self._rests_until.get(name, 0.0)
        ]
        return self._turns.order(mine)

    def _claim(self, mine: Sequence[keys.QueueName]) -> list[ClaimedJob]:
        room = self._window.room()
        if room is None:
            self._needs_calm = False
            return []
        is_alone = self._window.in_flight[0] == 0
        jobs, self._needs_calm = self._ledger.claim_or_wait(
            [Ask(name, room.jobs, room.tokens, room.bytes, is_alone) for name in mine]
        )
        self._turns.served((job.queue for job in jobs), mine)
        for job in jobs:
            self._window.take(job.tokens, job.size)
        self._quarantine.take(jobs)
        return jobs

    def _wait(self, mine: Sequence[keys.QueueName]) -> None:
        if mine:
            self._ledger.wait(mine, _BELL_WAIT_S)
        else:
            self._stopping.wait(_BELL_WAIT_S)
