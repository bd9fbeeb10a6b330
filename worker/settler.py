"""Settling in batches: outcomes on their way to Redis, and the credits that come back."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from vecfleet.common.errors import QueueFull, RedisUnavailable
from vecfleet.worker.job import Answer, HandOn, Settlement
from vecfleet.worker.ledger import Ledger
from vecfleet.worker.patience import Patience

log = logging.getLogger(__name__)

_MOST_JOBS = 128
_MOST_BYTES = 2 << 20  # Redis does nothing else meanwhile: a few milliseconds


class Settler:
    """A queue of outcomes, and the thread that settles them."""

    def __init__(
        self,
        ledger: Ledger,
        on_settled: Callable[[Sequence[Settlement], Sequence[bool]], None],
        over: threading.Event,
    ) -> None:
        """``on_settled`` is told, by whichever thread settled; ``over`` ends all patience."""
        self._ledger = ledger
        self._on_settled = on_settled
        self._over = over
        self._outcomes: queue.SimpleQueue[Settlement | None] = queue.SimpleQueue()

    def put(self, settlement: Settlement) -> None:
        """Settle this one with the next batch."""
        self._outcomes.put(settlement)

    def settle_now(self, batch: Sequence[Settlement]) -> None:
        """Settle in this thread; what Redis does not take is left to the one with the patience."""
        try:
            settled = self._ledger.settle(batch)
        except Exception:
            for settlement in batch:
                self._outcomes.put(settlement)
            return
        self._tell(batch, settled)

    def close(self) -> None:
        """``run`` settles what is there and returns."""
        self._outcomes.put(None)

    def run(self) -> None:
        """Settle until ``close``."""
        is_open = True
        while is_open:
            first = self._outcomes.get()
            if first is None:
                return
            batch, is_open = self._gather(first)
            self._settle(batch)

    def _gather(self, first: Settlement) -> tuple[list[Settlement], bool]:
        """What is there, up to a size that does not hold Redis up; false where it is the last."""
        batch, size = [first], _size(first)
        while len(batch) < _MOST_JOBS and size < _MOST_BYTES:
            try:
                another = self._outcomes.get_nowait()
            except queue.Empty:
                break
            if another is None:
                return batch, False
            batch.append(another)
            size += _size(another)
        return batch, True

    def _settle(self, batch: Sequence[Settlement]) -> None:
        """Settle until Redis has answered; the fence makes a second try harmless."""
        patience = Patience(self._over)
        while True:
            try:
                settled = self._ledger.settle(batch)
                break
            except (RedisUnavailable, QueueFull) as error:
                if self._over.is_set():
                    return
                patience.wait(error)
            except Exception:
                if len(batch) > 1:  # one of them may be at fault: the others must not pay for it
                    for settlement in batch:
                        self._settle([settlement])
                    return
                log.exception("cannot settle; the lease runs out and others take the job over")
                settled = [False]
                break
        self._tell(batch, settled)

    def _tell(self, batch: Sequence[Settlement], settled: Sequence[bool]) -> None:
        for settlement, done in zip(batch, settled, strict=True):
            if not done:
                log.warning("job %s was cancelled or taken over", settlement.job.id)
        self._on_settled(batch, settled)


def _size(settlement: Settlement) -> int:
    """Roughly how many bytes of an outcome go to Redis."""
    match settlement.outcome:
        case HandOn(data=data):
            return len(data)
        case Answer(body=dict() as body, size=size):
            return size + len(body.get("vectors", b""))
        case _:
            return 0
