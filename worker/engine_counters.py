"""What an engine counts whose steps run in another process."""

from __future__ import annotations

import statistics
import time
from collections import deque

from vecfleet.worker.activity import Activity
from vecfleet.worker.calls import OnStep
from vecfleet.worker.engine import EngineStats, Priority
from vecfleet.worker.vllm_requests import is_bulk

STEP_MEDIAN_OVER = 256


class EngineCounters:
    """Counts for ``EngineStats``, on one thread; any thread may read them."""

    def __init__(self, on_step: OnStep | None) -> None:
        self._on_step = on_step
        self.activity = Activity()
        self.tokens = self.bulk_tokens = self.texts = self.steps = self.pending_tokens = 0
        self._busy_s = 0.0
        self._busy_since: float | None = None
        self._last_step: float | None = None
        self._bulk_steps_s: deque[float] = deque(maxlen=STEP_MEDIAN_OVER)

    def wait(self, tokens: int) -> None:
        """Texts of so many tokens wait."""
        self.pending_tokens += tokens
        if self._busy_since is None:
            self._busy_since = self._last_step = time.perf_counter()

    def forget(self, tokens: int) -> None:
        """So many tokens wait no longer."""
        self.pending_tokens -= tokens
        if not self.pending_tokens and self._busy_since is not None:
            self._busy_s += time.perf_counter() - self._busy_since
            self._busy_since = self._last_step = None

    def on_step_end(self, request_ids: list[str]) -> None:
        """A step ended that finished these; none in the midst of a text longer than a step."""
        now = time.perf_counter()
        self.steps += 1
        self.activity.got_on()
        bulk = sum(map(is_bulk, request_ids))
        is_bulks = 2 * bulk > len(request_ids) or not request_ids  # a query is shorter than a step
        if self._last_step is not None and is_bulks:
            self._bulk_steps_s.append(now - self._last_step)
        self._last_step = now
        if self._on_step:
            all_bulk = bulk == len(request_ids)
            self._on_step(Priority.BULK if all_bulk else Priority.INTERACTIVE, len(request_ids))

    def computed(self, priority: Priority, tokens: int) -> None:
        """A text of so many tokens is done."""
        self.tokens += tokens
        self.texts += 1
        if priority is Priority.BULK:
            self.bulk_tokens += tokens

    def stats(self) -> EngineStats:
        """What there is to tell now."""
        since = self._busy_since
        steps = list(self._bulk_steps_s)
        return EngineStats(
            tokens=self.tokens,
            texts=self.texts,
            steps=self.steps,
            busy_s=self._busy_s + (time.perf_counter() - since if since is not None else 0.0),
            pending_tokens=self.pending_tokens,
            bulk_step_p50_s=statistics.median(steps) if steps else 0.0,
            bulk_tokens=self.bulk_tokens,
            stalled_s=self.activity.stalled_s,
        )
