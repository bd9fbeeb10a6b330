"""What a worker says of its engine with each heartbeat."""

from __future__ import annotations

import time
from collections.abc import Callable

from vecfleet.worker.engine import Engine

_HALF_LIFE_S = 10.0


class EngineStatus:
    """Turns an engine's counters into rates."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._before = engine.stats
        self._at = clock()
        self._tokens_per_s = 0.0

    def fields(self) -> dict[str, str | int | float]:
        """For ``vf:worker:{worker}``. The rate is that of busy time: what the engine can do."""
        stats, now = self._engine.stats, self._clock()
        busy_s = stats.busy_s - self._before.busy_s
        if busy_s > 0:
            rate = (stats.tokens - self._before.tokens) / busy_s
            weight = 1.0 if not self._tokens_per_s else 1 - 0.5 ** (busy_s / _HALF_LIFE_S)
            self._tokens_per_s += weight * (rate - self._tokens_per_s)
        self._before, self._at = stats, now
        return {
            "role": "worker",
            "device": self._engine.device,
            "model": self._engine.card.name,
            "tokens_per_s": round(self._tokens_per_s, 1),
            "tokens": stats.tokens,
            "bulk_tokens": stats.bulk_tokens,
            "texts": stats.texts,
            "steps": stats.steps,
            "busy_s": round(stats.busy_s, 3),
            "pending_tokens": stats.pending_tokens,
            "bulk_step_p50_ms": round(stats.bulk_step_p50_s * 1000, 2),
        }
