"""What runs inside vLLM's own process: its scheduler, with queries in steps of their own.

vLLM fills the step that takes a query up with bulk, so a query waits for the end of one full step
and is part of another.  Here such a step holds what goes before all waiting bulk and no more: a
query then waits for the step that runs, and a short one.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from vecfleet.common.parent_death import die_with_starter
from vecfleet.worker.vllm_requests import is_bulk

# vLLM's process does not notice when a worker is killed, and would keep the GPU's memory.
die_with_starter()


class QueriesFirst(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, with a smaller budget for steps that have queries."""

    max_num_scheduled_tokens: int

    def schedule(self, *args: Any, **given: Any) -> SchedulerOutput:
        """See vLLM."""
        full = self.max_num_scheduled_tokens
        queries = self._query_tokens()
        if queries:
            begun = sum(r.num_tokens - r.num_computed_tokens for r in self.running)
            self.max_num_scheduled_tokens = min(full, queries + begun)
        try:
            return super().schedule(*args, **given)
        finally:
            self.max_num_scheduled_tokens = full

    def _query_tokens(self) -> int:
        """Tokens of the waiting queries that go before all waiting bulk."""
        first_bulk: float = float("inf")
        queries = []
        for request in self.waiting:
            if is_bulk(request.request_id):
                first_bulk = min(first_bulk, request.priority)
            else:
                queries.append(request)
        return sum(query.num_tokens for query in queries if query.priority <= first_bulk)
