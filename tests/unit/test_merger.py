"""Whatever goes wrong with a merge, its jobs get an outcome, and the next ones are tried."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

from vecfleet.common import keys
from vecfleet.common.errors import Unavailable
from vecfleet.worker.collection_writers import CollectionWriters
from vecfleet.worker.job import ClaimedJob, Commit, Release
from vecfleet.worker.merger import Merger

UID = "a" * 32


class Writers:
    """A disk of which nothing can be read, until it is well; then the collection is deleted."""

    is_well = False

    async def on_disk(self, work: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(work)

    def opened(self, uid: str) -> None:
        if not self.is_well:
            raise RuntimeError("nobody foresaw it")

    def was_deleted(self, uid: str) -> bool:
        return True

    def are_stale(self) -> bool:
        raise Unavailable("the catalogue cannot be read")


def job(name: str) -> ClaimedJob:
    return ClaimedJob(
        id=name,
        execution=f"{name}-x",
        queue=keys.merge_queue(UID),
        function="vecfleet.merge",
        payload=b"shard",
        tokens=1,
        claimed_us=1,
        enqueued_us=1,
        attempts=1,
    )


async def test_jobs_of_which_nothing_can_be_said_are_released() -> None:
    writers = Writers()
    merger = Merger(cast(CollectionWriters, writers), lambda: None)
    async with asyncio.timeout(20):
        (first,) = await merger.merge([job("first")])
        assert isinstance(first, Release) and first.rest_s > 0
        writers.is_well = True
        (second,) = await merger.merge([job("second")])
    assert isinstance(second, Commit)
