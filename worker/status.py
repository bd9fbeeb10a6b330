"""What a worker says of its engine with each heartbeat."""

from __future__ import annotations

from vecfleet.worker.engine import Engine, EngineStats

_HALF_LIFE_S = 10.0
_FULL_STEPS = 2  # with so many steps' worth of texts waiting an engine does what it can


class EngineStatus:
    """Turns an engine's counters into rates."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._before = engine.stats
        self._tokens_per_s = 0.0
        self._was_full = False
        self._begins_full = False  # when it was looked at last

    @property
    def tokens_per_s(self) -> float:
        """What the engine can do, as far as is known."""
        return self._tokens_per_s

    def fields(self) -> dict[str, str | int | float]:
        """For ``vf:worker:{worker}``. The rate is that of busy time: what the engine can do.

        Steps that are not full tell too little: a single query takes nearly as long as twenty. So
        ``was_full`` says whether there was ever enough to do, and a lower rate counts only then.
        """
        stats = self._engine.stats
        self._learn(stats)
        self._before = stats
        return {
            "role": "worker",
            "device": self._engine.device,
            "model": self._engine.card.name,
            "tokens_per_s": round(self._tokens_per_s, 1),
            "was_full": int(self._was_full),
            "tokens": stats.tokens,
            "bulk_tokens": stats.bulk_tokens,
            "texts": stats.texts,
            "steps": stats.steps,
            "busy_s": round(stats.busy_s, 3),
            "pending_tokens": stats.pending_tokens,
            "bulk_step_p50_ms": round(stats.bulk_step_p50_s * 1000, 2),
        }

    def _learn(self, stats: EngineStats) -> None:
        busy_s = stats.busy_s - self._before.busy_s
        steps = stats.steps - self._before.steps
        if busy_s <= 0 or steps <= 0:
            self._begins_full &= stats.pending_tokens > 0
            return
        tokens = stats.tokens - self._before.tokens
        rate = tokens / busy_s
        # From one look to the next: what has just come says nothing of the steps before it.
        ends_full = stats.pending_tokens >= _FULL_STEPS * tokens / steps
        is_full, self._begins_full = ends_full and self._begins_full, ends_full
        if rate > self._tokens_per_s or (is_full and not self._was_full):
            self._tokens_per_s = rate
        elif is_full:
            self._tokens_per_s += (1 - 0.5 ** (busy_s / _HALF_LIFE_S)) * (rate - self._tokens_per_s)
        self._was_full |= is_full
