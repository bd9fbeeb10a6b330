"""A collection that cannot be written stops no other one, nor the catalogue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import redis
from servers import eventually

from vecfleet.common import codec, keys, payloads
from vecfleet.common.collection import Collection, CollectionSpec
from vecfleet.common.errors import Unavailable
from vecfleet.common.queue_client import NewJob, QueueClient
from vecfleet.common.redis_client import connect, connect_async
from vecfleet.worker.aggregator import Aggregator
from vecfleet.worker.aggregator_main import AggregatorConfig, _merge
from vecfleet.worker.catalog import Catalog
from vecfleet.worker.job import ClaimedJob, Commit, Release
from vecfleet.worker.partition import ApplyOutcome, PartitionWriter
from vecfleet.worker.shard import Shard, build_shard

SPEC = CollectionSpec(model="m", space="0" * 16, dimension=8)


@pytest.fixture
def client(redis_url: str) -> redis.Redis:
    return connect(redis_url)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The uids of collections whose disk is full."""
    uids: set[str] = set()
    apply, open_writer = PartitionWriter.apply, PartitionWriter.open

    def applying(writer: PartitionWriter, shards: Sequence[Shard]) -> list[ApplyOutcome]:
        if writer.state.spec.uid in uids:
            raise Unavailable("No space left on device")
        return apply(writer, shards)

    def opening(directory: Path, spec: object, token: int) -> PartitionWriter:
        if directory.parent.name in uids:
            raise Unavailable("No space left on device")
        return open_writer(directory, spec, token)

    monkeypatch.setattr(PartitionWriter, "apply", applying)
    monkeypatch.setattr(PartitionWriter, "open", opening)
    return uids


def shard(number: int) -> bytes:
    vector = np.eye(1, SPEC.dimension, number % SPEC.dimension, dtype=np.float32)
    return build_shard(
        f"s-{number}",
        SPEC.space,
        SPEC.dimension,
        ids=[f"d{number}"],
        texts=["a text"],
        vectors=vector,
        versions=number + 1,
    )


def merge_job(collection: Collection, number: int) -> ClaimedJob:
    return ClaimedJob(
        id=f"s-{number}",
        execution="e",
        queue=collection.merge_queue,
        function=payloads.MERGE,
        payload=shard(number),
        tokens=1,
        claimed_us=0,
        enqueued_us=0,
        attempts=1,
        documents=1,
    )


@asynccontextmanager
async def opened(client: redis.Redis, root: Path, token: int = 1) -> AsyncIterator[Aggregator]:
    catalog = Catalog.open(root, token=token)
    aggregator = Aggregator(catalog, client, token, on_stale=lambda: None)
    await aggregator.writers.on_disk(aggregator.open)
    try:
        yield aggregator
    finally:
        await asyncio.to_thread(aggregator.close)


async def create(aggregator: Aggregator, name: str) -> Collection:
    job = ClaimedJob(
        id=name,
        execution="e",
        queue=keys.catalog_queue(),
        function=payloads.CREATE,
        payload={"name": name, "spec": SPEC.to_wire()},
        tokens=1,
        claimed_us=0,
        enqueued_us=0,
        attempts=1,
    )
    return Collection.from_wire((await aggregator.keeper.create(job)).body)


async def test_its_shards_go_back_and_it_rests_longer_each_time(
    client: redis.Redis, tmp_path: Path, full: set[str]
) -> None:
    async with opened(client, tmp_path) as aggregator:
        bad, good = await create(aggregator, "bad"), await create(aggregator, "good")
        full.add(bad.uid)
        rests = []
        for _ in range(5):
            outcomes = await aggregator.merger.merge([merge_job(bad, 1), merge_job(bad, 2)])
            assert outcomes[0] == outcomes[1]
            assert isinstance(outcomes[0], Release)
            rests.append(outcomes[0].rest_s)
        assert rests == [1, 2, 4, 8, 8]
        assert isinstance((await aggregator.merger.merge([merge_job(good, 1)]))[0], Commit)
        full.clear()
        assert isinstance((await aggregator.merger.merge([merge_job(bad, 1)]))[0], Commit)
        full.add(bad.uid)
        assert await aggregator.merger.merge([merge_job(bad, 2)]) == [Release(1)]


async def test_one_that_cannot_be_opened_is_opened_with_its_shards(
    client: redis.Redis, tmp_path: Path, full: set[str]
) -> None:
    async with opened(client, tmp_path) as aggregator:
        bad, good = await create(aggregator, "bad"), await create(aggregator, "good")
    full.add(bad.uid)
    async with opened(client, tmp_path, token=2) as aggregator:
        assert bad.merge_queue in aggregator.queues()
        assert isinstance((await aggregator.merger.merge([merge_job(good, 1)]))[0], Commit)
        assert await aggregator.merger.merge([merge_job(bad, 1)]) == [Release(1)]
        assert {found.name for found in Catalog.open(tmp_path).list()} == {"bad", "good"}
        full.clear()
        assert isinstance((await aggregator.merger.merge([merge_job(bad, 1)]))[0], Commit)


async def test_one_that_was_made_on_a_full_disk_is_known_and_opened_later(
    client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(client, tmp_path) as aggregator:
        with monkeypatch.context() as disk:
            disk.setattr(PartitionWriter, "open", _no_space)
            with pytest.raises(Unavailable):
                await create(aggregator, "new")
        await asyncio.to_thread(aggregator.keeper.publish)
        assert client.hexists("vf:collections:-", "new")
        made = await create(aggregator, "new")  # the same call again
        assert made.merge_queue in aggregator.queues()
        assert isinstance((await aggregator.merger.merge([merge_job(made, 1)]))[0], Commit)


def _no_space(*_: object) -> PartitionWriter:
    raise Unavailable("No space left on device")


async def test_after_a_crash_its_suspect_keeps_nobody_out(
    client: redis.Redis, redis_url: str, tmp_path: Path, full: set[str]
) -> None:
    """What the last aggregator held when it died is claimed alone, again and again."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    async with opened(client, tmp_path) as aggregator, connect_async(redis_url) as connection:
        queues = QueueClient(connection)

        async def send(collection: Collection, number: int) -> None:
            data = codec.pack_call(payloads.MERGE, shard(number))
            job = NewJob(f"s-{number}", data, 1, documents=1)
            await queues.enqueue(collection.merge_queue, [job])

        async def ask(function: str, name: str) -> None:
            data = codec.pack_call(function, {"name": name, "spec": SPEC.to_wire()})
            await queues.enqueue(keys.catalog_queue(), [NewJob(f"{function}-{name}", data, 1)])

        def are_gone(*names: str) -> bool:
            return client.exists(*(keys.job(name) for name in names)) == 0

        bad, good = await create(aggregator, "bad"), await create(aggregator, "good")
        full.add(bad.uid)
        for number in range(10):
            await send(bad, number)
            client.hset(keys.job(f"s-{number}"), "vf_attempts", 1)
        config = AggregatorConfig(redis_url, tmp_path)
        working = asyncio.create_task(
            _merge(aggregator, config, (stop, hurry), lambda: None, on_event=None)
        )
        try:
            await eventually(lambda: bool(aggregator.merger._rests_s))
            for number in range(10, 15):
                await send(good, number)
                await eventually(lambda n=number: are_gone(f"s-{n}"))
            await ask(payloads.CREATE, "another")
            await ask(payloads.DELETE, "good")
            created, deleted = f"{payloads.CREATE}-another", f"{payloads.DELETE}-good"
            await eventually(lambda: are_gone(created, deleted))
            assert not are_gone("s-0")
            # Not charged, and still suspects.
            attempts = [client.hget(keys.job(f"s-{number}"), "vf_attempts") for number in range(10)]
            assert {int(found) for found in attempts} <= {1, 2}
            full.clear()
            names = [f"s-{number}" for number in range(10)]
            await eventually(lambda: are_gone(*names), deadline_s=60)
        finally:
            stop.set()
            await working
