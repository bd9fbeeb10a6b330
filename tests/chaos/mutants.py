"""Defects that are planted to prove the harness: each must make it fail.

Two plant what the promise forbids, a loss and a double. The others take away one of the means that
keep the promise: the version check, the order of commit and settlement, the fences.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from chaos.crash_points import find

_EVERY = 5  # the planted defects strike at every so-manieth shard
_LATE_S = 0.4


def planted_loss() -> None:
    """The index says that it has applied a shard, and has not."""
    owner, method, apply = find("vecfleet.worker.partition:PartitionWriter.apply")
    from vecfleet.worker.partition import ApplyOutcome

    count = itertools.count(1)

    def forgetful(self: Any, shards: Sequence[Any]) -> Any:
        lost = {shard.shard_id for shard in shards if next(count) % _EVERY == 0}
        kept = apply(self, [shard for shard in shards if shard.shard_id not in lost])
        return [
            *kept,
            *(ApplyOutcome(s.shard_id, "applied", len(s)) for s in shards if s.shard_id in lost),
        ]

    setattr(owner, method, forgetful)


def planted_double() -> None:
    """The index takes a shard a second time under another name, and both live."""
    owner, method, apply = find("vecfleet.worker.partition:PartitionWriter.apply")
    from vecfleet.worker import partition

    count = itertools.count(1)
    compare = partition.deaths_by

    def doubling(self: Any, shards: Sequence[Any]) -> Any:
        outcomes = apply(self, shards)
        for shard in shards:
            if next(count) % _EVERY == 0:
                partition.deaths_by = lambda *_: {}
                try:
                    apply(self, [replace(shard, shard_id=f"{shard.shard_id}-again")])
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
    owner, method, applied = find("vecfleet.worker.merger:Merger._applied")
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


def no_fence() -> None:
    """Whoever ran a job may settle it, and whoever had the index may publish, lease or not."""
    from vecfleet.worker import ledger

    read = ledger.read_lua
    fence = "  return held\n"

    def without(directory: Any, *names: str) -> str:
        script = read(directory, *names)
        if "ledger" in names and fence not in script:
            raise LookupError("ledger.lua has no such fence any more; change the harness too")
        return script.replace(fence, "  return true\n")

    ledger.read_lua = without
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
        no_fence,
    )
}
