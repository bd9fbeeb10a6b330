"""Defects that are planted to prove the harness: each must make it fail.

Two plant what the promise forbids, a loss and a double. The others take away one of the means that
keep the promise: the version check, the order of commit and settlement, the fences.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from chaos.crash_points import find

_EVERY = 3  # the planted defects strike at every so-manieth merge
_LATE_S = 0.4


def planted_loss() -> None:
    """The index says that it has applied a shard, and has not."""
    owner, method, apply = find("vecfleet.worker.partition:PartitionWriter.apply")
    from vecfleet.worker.partition import ApplyOutcome

    calls = 0

    def forgetful(self: Any, shards: Sequence[Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls % _EVERY:
            return apply(self, shards)
        *others, lost = shards
        return [*apply(self, others), ApplyOutcome(lost.shard_id, "applied", len(lost))]

    setattr(owner, method, forgetful)


def planted_double() -> None:
    """The index takes a shard a second time under another name, and both live."""
    owner, method, apply = find("vecfleet.worker.partition:PartitionWriter.apply")
    from vecfleet.worker import partition

    calls = 0
    compare = partition.deaths_by

    def doubling(self: Any, shards: Sequence[Any]) -> Any:
        nonlocal calls
        calls += 1
        outcomes = apply(self, shards)
        if calls % _EVERY == 0:
            partition.deaths_by = lambda *_: {}
            try:
                apply(self, [replace(shards[0], shard_id=f"{shards[0].shard_id}-again")])
            finally:
                partition.deaths_by = compare
        return outcomes

    setattr(owner, method, doubling)


def no_version_check() -> None:
    """Whatever comes last wins, whatever its version."""
    import numpy as np

    from vecfleet.worker import partition
    from vecfleet.worker.supersession import losers_within

    assert callable(partition.deaths_by)

    def last_wins(segment: Any, number: int, others: Any) -> dict[int, Any]:
        rows = segment.rows
        deaths = {number: losers_within(rows.keys, np.arange(len(rows)))}
        for other, part in others.items():
            found = part.segment.find(rows.keys[segment.order], part.liveness.alive)
            deaths[other] = np.sort(found[found >= 0])
        return {part: dead for part, dead in deaths.items() if len(dead)}

    partition.deaths_by = last_wins


def settle_before_commit() -> None:
    """Shards are settled at once and written into the index a moment later."""
    owner, method, applied = find("vecfleet.worker.aggregator:Aggregator._applied")
    from vecfleet.worker.job import Commit

    later: set[asyncio.Task[Any]] = set()

    async def write(self: Any, uid: str, jobs: Sequence[Any]) -> None:
        await asyncio.sleep(_LATE_S)
        await applied(self, uid, jobs)

    async def hasty(self: Any, uid: str, jobs: Sequence[Any]) -> list[Any]:
        task = asyncio.create_task(write(self, uid, jobs))
        later.add(task)
        task.add_done_callback(later.discard)
        return [Commit(j.documents, {"version": j.version, "documents": j.documents}) for j in jobs]

    setattr(owner, method, hasty)


def no_settle_fence() -> None:
    """Whoever ran a job may settle it, whether or not it still has the lease."""
    from vecfleet.worker import ledger

    read = ledger.read_lua
    fence = "  return held\n"

    def without(directory: Any, *names: str) -> str:
        script = read(directory, *names)
        if "ledger" in names and fence not in script:
            raise LookupError("ledger.lua has no such fence any more; change the harness too")
        return script.replace(fence, "  return true\n")

    ledger.read_lua = without


def no_writer_fence() -> None:
    """A writer may publish, whoever has taken the index over."""
    owner, method, commit = find("vecfleet.worker.manifest:Manifest.commit")

    def anybodys(self: Any, token: int, *args: Any, **options: Any) -> Any:
        return commit(self, self.state().token, *args, **options)

    setattr(owner, method, anybodys)


MUTANTS: dict[str, Callable[[], None]] = {
    mutant.__name__: mutant
    for mutant in (
        planted_loss,
        planted_double,
        no_version_check,
        settle_before_commit,
        no_settle_fence,
        no_writer_fence,
    )
}
