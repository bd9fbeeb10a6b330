"""The aggregator's catalogue and merges, on a real Redis and a real folder."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import redis
import redis.asyncio
from servers import eventually

from vecfleet.common import codec, keys, payloads
from vecfleet.common.collection import Collection, CollectionSpec
from vecfleet.common.directory import Directory
from vecfleet.common.errors import (
    CollectionConflict,
    CorruptManifest,
    QueueFull,
    StaleWriter,
    Unavailable,
    UnknownCollection,
)
from vecfleet.common.queue_client import NewJob, QueueClient, Route
from vecfleet.common.redis_client import connect, connect_async
from vecfleet.common.submission import Submissions
from vecfleet.worker.aggregator import Aggregator
from vecfleet.worker.aggregator_main import AggregatorConfig, run_aggregator
from vecfleet.worker.catalog import FILE_NAME, INDEX_FOLDER, Catalog
from vecfleet.worker.job import Answer, ClaimedJob, Commit, Failure, Release, Settlement
from vecfleet.worker.ledger import Ask, Ledger
from vecfleet.worker.partition import ApplyOutcome, PartitionWriter
from vecfleet.worker.shard import Shard, build_shard

SPEC = CollectionSpec(model="m", space="0" * 16, dimension=8)


@pytest.fixture
def client(redis_url: str) -> redis.Redis:
    return connect(redis_url)


@pytest.fixture
async def aggregator(client: redis.Redis, tmp_path: Path) -> AsyncIterator[Aggregator]:
    made = Aggregator(Catalog.open(tmp_path), client, 1, on_stale=lambda: None)
    await made.writers.on_disk(made.open)
    yield made
    await asyncio.to_thread(made.close)


def catalog_job(function: str, name: str, tenant: str = keys.DEFAULT_TENANT) -> ClaimedJob:
    payload = {"name": name, "tenant": tenant, "spec": SPEC.to_wire()}
    return ClaimedJob(
        id=f"{function}-{name}",
        execution="e",
        queue=keys.catalog_queue(tenant=tenant),
        function=function,
        payload=payload,
        tokens=1,
        claimed_us=0,
        enqueued_us=0,
        attempts=1,
    )


async def create(
    aggregator: Aggregator, name: str, tenant: str = keys.DEFAULT_TENANT
) -> Collection:
    answer = await aggregator.keeper.create(catalog_job(payloads.CREATE, name, tenant))
    assert isinstance(answer, Answer)
    return Collection.from_wire(answer.body)


async def delete(aggregator: Aggregator, name: str, tenant: str = keys.DEFAULT_TENANT) -> None:
    await aggregator.keeper.delete(catalog_job(payloads.DELETE, name, tenant))


async def test_a_deletion_that_comes_again_touches_no_other_collection_of_the_name(
    aggregator: Aggregator,
) -> None:
    first = await create(aggregator, "books")
    call = catalog_job(payloads.DELETE, "books")
    call = replace(call, payload={**call.payload, "uid": first.uid})
    assert (await aggregator.keeper.delete(call)).body == {"uid": first.uid}
    second = await create(aggregator, "books")
    assert (await aggregator.keeper.delete(call)).body == {"uid": first.uid}, "it was done already"
    unknown = replace(call, payload={**call.payload, "uid": "0" * 32})
    with pytest.raises(UnknownCollection, match="made anew"):
        await aggregator.keeper.delete(unknown)
    assert (await create(aggregator, "books")).uid == second.uid, "which is still there"


async def test_a_creation_that_comes_after_its_deletion_makes_nothing(
    aggregator: Aggregator,
) -> None:
    made = replace(catalog_job(payloads.CREATE, "books"), enqueued_us=100, claimed_us=101)
    gone = replace(catalog_job(payloads.DELETE, "books"), enqueued_us=made.enqueued_us + 10)
    await aggregator.keeper.create(made)
    await aggregator.keeper.delete(gone)
    late = replace(made, claimed_us=gone.enqueued_us + 1)
    with pytest.raises(CollectionConflict, match="create it again"):
        await aggregator.keeper.create(late)
    elsewhere = replace(late, queue=keys.catalog_queue(tenant="acme"))
    elsewhere = replace(elsewhere, payload={**late.payload, "tenant": "acme"})
    assert isinstance(await aggregator.keeper.create(elsewhere), Answer)
    before_a_clock_was_set_back = replace(late, claimed_us=gone.enqueued_us - 1)
    answer = await aggregator.keeper.create(before_a_clock_was_set_back)
    assert isinstance(answer, Answer)
    again = await aggregator.keeper.create(late)
    assert isinstance(again, Answer) and again.body == answer.body, "there is one: that it is"


async def test_no_tenant_has_more_collections_than_all_leave_free(
    client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Aggregator(Catalog.open(tmp_path), client, 1, on_stale=lambda: None, max_collections=4)
    await made.writers.on_disk(made.open)
    first = await create(made, "a0", "a")
    await create(made, "a1", "a")
    with pytest.raises(QueueFull, match=r"share of the 4 collections.*delete some"):
        await create(made, "a2", "a")
    assert await create(made, "a0", "a") == first, "what is there is no new one"
    await create(made, "b0", "b")
    with pytest.raises(QueueFull, match="share"):
        await create(made, "b1", "b")
    await create(made, "c0", "c")
    with pytest.raises(QueueFull, match="share"):
        await create(made, "d0", "d")
    assert published(client, "a") == {"a0", "a1"} and published(client, "d") == set()
    await delete(made, "c0", "c")
    await create(made, "d0", "d")
    await asyncio.to_thread(made.close)


async def test_collections_are_not_made_and_deleted_without_end(
    client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Aggregator(
        *(Catalog.open(tmp_path), client, 1),
        on_stale=lambda: None,
        max_collections=100,
        max_deleted=4,
    )
    await made.writers.on_disk(made.open)
    began, began_monotonic = time.time(), time.monotonic()
    for _ in range(2):
        await create(made, "a", "a")
        await delete(made, "a", "a")
    await create(made, "b", "b")
    week_s = float(keys.SUBMISSION_TTL_S)
    for left_s, retry_s in ((week_s, 3600.0), (3000.0, 3000.0), (1.0, 60.0)):
        now = began + week_s - left_s
        monkeypatch.setattr("vecfleet.worker.catalog_keeper.time.time", lambda at=now: at)
        with pytest.raises(QueueFull, match=r"of the 4 .* deleted its share") as refused:
            await create(made, "a", "a")
        told = refused.value.retry_after_s
        assert told is not None
        assert retry_s <= told < retry_s + (time.monotonic() - began_monotonic) + 1
    later = began + 2 * week_s
    monkeypatch.setattr("vecfleet.worker.catalog_keeper.time.time", lambda: later)
    await create(made, "a", "a")
    await asyncio.to_thread(made.close)


@pytest.mark.parametrize("where", ["rq:queue:", "vf:parked:", "vf:lease:", "rq:failed:"])
async def test_of_deleted_collections_those_are_asked_in_which_something_waits(
    client: redis.Redis, tmp_path: Path, where: str
) -> None:
    made = Aggregator(Catalog.open(tmp_path), client, 1, on_stale=lambda: None)
    await made.writers.on_disk(made.open)
    first, second = await create(made, "first", "a"), await create(made, "second")
    for collection in (first, second):
        await delete(made, collection.name, collection.tenant)
        assert collection.merge_queue in made.queues(), "something may be there"
    made.keeper.ask_deleted()
    assert [queue.task for queue in made.queues()] == ["catalog"], "a claim asks no more for it"
    if where in ("vf:lease:", "rq:failed:"):
        client.zadd(f"{where}{first.merge_queue}", {"job": 1})
    else:
        client.rpush(f"{where}{first.merge_queue}", "job")
    made.keeper.ask_deleted()
    assert [queue for queue in made.queues() if queue.task == "merge"] == [first.merge_queue]
    await asyncio.to_thread(made.close)
    again = Aggregator(Catalog.open(tmp_path), client, 2, on_stale=lambda: None)
    await again.writers.on_disk(again.open)
    assert [queue for queue in again.queues() if queue.task == "merge"] == [first.merge_queue]
    await asyncio.to_thread(again.close)


def merge_job(collection: Collection, number: int) -> ClaimedJob:
    vector = np.eye(1, SPEC.dimension, number % SPEC.dimension, dtype=np.float32)
    shard = build_shard(
        f"s-{number}",
        SPEC.space,
        SPEC.dimension,
        ids=[f"d{number}"],
        texts=["a text"],
        vectors=vector,
        versions=number + 1,
    )
    return ClaimedJob(
        id=f"s-{number}",
        execution="e",
        queue=collection.merge_queue,
        function=payloads.MERGE,
        payload=shard,
        tokens=1,
        claimed_us=0,
        enqueued_us=0,
        attempts=1,
        documents=1,
    )


def published(client: redis.Redis, tenant: str = keys.DEFAULT_TENANT) -> set[str]:
    return {name.decode() for name in cast(Any, client.hkeys(keys.collections(tenant)))}


async def test_the_catalogue_is_changed_and_published_in_one_thread(
    aggregator: Aggregator, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A publication that read before a change and wrote after it would undo the change."""
    threads: set[int] = set()
    hgetall = client.hgetall

    def noting(key: str) -> object:
        threads.add(threading.get_ident())
        return hgetall(key)

    monkeypatch.setattr(client, "hgetall", noting)
    for number in range(10):
        await asyncio.gather(
            asyncio.to_thread(aggregator.keeper.publish), create(aggregator, f"c{number}")
        )
    await asyncio.gather(
        asyncio.to_thread(aggregator.keeper.publish),
        *(delete(aggregator, f"c{number}") for number in range(9)),
    )
    assert published(client) == {"c9"}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_the_last_collection_of_a_tenant_goes_from_redis(
    aggregator: Aggregator, client: redis.Redis
) -> None:
    await create(aggregator, "books", "acme")
    await create(aggregator, "books")
    assert published(client, "acme") == {"books"}
    await delete(aggregator, "books", "acme")
    assert published(client, "acme") == set()
    assert published(client) == {"books"}
    assert keys.catalog_queue(tenant=keys.EVERY_TENANT) in aggregator.queues()
    await create(aggregator, "again", "acme")
    assert published(client, "acme") == {"again"}


async def test_a_record_that_a_crash_left_goes_at_the_next_start(
    client: redis.Redis, tmp_path: Path
) -> None:
    first = Aggregator(Catalog.open(tmp_path), client, 1, on_stale=lambda: None)
    await first.writers.on_disk(first.open)
    await create(first, "books", "acme")
    await asyncio.to_thread(first.close)
    catalog = Catalog.open(tmp_path)
    catalog.delete("books", "acme")  # and the process dies before it tells Redis
    assert published(client, "acme") == {"books"}
    second = Aggregator(catalog, client, 2, on_stale=lambda: None)
    await second.writers.on_disk(second.open)
    await asyncio.to_thread(second.close)
    assert published(client, "acme") == set()


@pytest.mark.parametrize("name", [b"books", b"evil", b"\xff"])
async def test_a_record_that_cannot_be_read_is_written_again_or_goes(
    aggregator: Aggregator, client: redis.Redis, name: bytes
) -> None:
    await create(aggregator, "books")
    before = client.hgetall(keys.collections())
    client.hset(keys.collections(), name, b"\xc1")  # type: ignore[arg-type]
    await asyncio.to_thread(aggregator.keeper.publish)
    assert client.hgetall(keys.collections()) == before


async def test_a_shard_in_the_catalogues_queue_fails(aggregator: Aggregator) -> None:
    """Written there by hand; given back, it would be claimed again at once, for ever."""
    collection = await create(aggregator, "docs")
    stray = replace(merge_job(collection, 1), id="stray", queue=keys.catalog_queue())
    failed, good = await aggregator.merger.merge([stray, merge_job(collection, 2)])
    assert isinstance(failed, Failure)
    assert isinstance(good, Commit)


async def test_an_unforeseen_error_is_charged_to_its_cause_alone(
    aggregator: Aggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = await create(aggregator, "books")
    apply = PartitionWriter.apply

    def failing(writer: PartitionWriter, shards: Sequence[Shard]) -> list[ApplyOutcome]:
        if any(shard.shard_id == "s-2" for shard in shards):
            raise MemoryError("poison")
        return apply(writer, shards)

    monkeypatch.setattr(PartitionWriter, "apply", failing)
    outcomes = await aggregator.merger.merge([merge_job(collection, number) for number in range(4)])
    assert [type(outcome) for outcome in outcomes] == [Commit, Commit, Failure, Commit]


async def delivered(url: str, job: ClaimedJob) -> None:
    """Put ``job`` into its queue, as the only block of the submission s."""
    async with connect_async(url) as connection:
        submissions = Submissions(connection)
        await submissions.open("s", tenant="-", collection="books", uid="u")
        data = codec.pack_call(payloads.MERGE, job.payload)
        await QueueClient(connection).enqueue(
            job.queue, [NewJob(job.id, data, 1, 0, 1)], Route(submission="s")
        )
        await submissions.close("s", blocks=1, documents=1)


def claimed_and_died(client: redis.Redis, queue: keys.QueueName) -> ClaimedJob:
    """The job of a writer that is dead by now."""
    (job,) = Ledger(client, "dying").claim([Ask(queue, 9, 1 << 40)])
    client.zadd(keys.lease(queue), {f"{job.id}:{job.execution}": 1})
    return job


@pytest.mark.parametrize("is_committed", [True, False])
async def test_a_shard_whose_writer_died_three_times_is_in_the_index_or_in_the_dead_letter(
    aggregator: Aggregator, client: redis.Redis, redis_url: str, is_committed: bool
) -> None:
    """Not in both, wherever between the commit and the settlement it was that its writers died."""
    collection = await create(aggregator, "books")
    queue, ledger = collection.merge_queue, Ledger(client, "w")
    await delivered(redis_url, merge_job(collection, 0))
    for _ in range(keys.MAX_ATTEMPTS):
        died = claimed_and_died(client, queue)
        if is_committed:
            assert isinstance((await aggregator.merger.merge([died]))[0], Commit)
        assert ledger.rescue([queue]) == (1, 0)
    (job,) = ledger.claim([Ask(queue, 9, 1 << 40)])
    (outcome,) = await aggregator.merger.merge([job])
    assert ledger.settle([Settlement(job, outcome)]) == [True]
    fields = ("state", "committed_documents", "failed_documents")
    told = [value or b"0" for value in client.hmget(keys.submission("s"), *fields)]
    writer = aggregator.writers.get(collection.uid)
    assert writer is not None
    visible, buried = writer.stats().documents, client.zrange(keys.dead(queue), 0, -1)
    if is_committed:
        assert (visible, buried, told) == (1, [], [b"done", b"1", b"0"])
    else:
        assert isinstance(outcome, Failure) and "too often" in outcome.error.message
        assert (visible, buried, told) == (0, [b"s-0"], [b"done", b"0", b"1"])


async def test_a_shard_that_cannot_even_be_looked_for_is_buried_in_the_end(
    aggregator: Aggregator, client: redis.Redis, redis_url: str
) -> None:
    collection = await create(aggregator, "books")
    queue, ledger = collection.merge_queue, Ledger(client, "w")
    await delivered(redis_url, merge_job(collection, 0))
    for death in range(1, 2 * keys.MAX_ATTEMPTS + 1):
        claimed_and_died(client, queue)
        assert ledger.rescue([queue]) == ((1, 0) if death < 2 * keys.MAX_ATTEMPTS else (0, 1))


async def test_damage_found_at_run_time_takes_one_collection_out_of_service(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    damaged, other = await create(aggregator, "damaged"), await create(aggregator, "other")
    assert isinstance((await aggregator.merger.merge([merge_job(damaged, 0)]))[0], Commit)
    with sqlite3.connect(tmp_path / damaged.uid / "0" / "manifest.db") as manifest:
        manifest.execute("DROP TABLE applied")
    jobs = [merge_job(damaged, number) for number in range(1, 4)]
    assert await aggregator.merger.merge(jobs) == [Release()] * 3
    assert damaged.merge_queue not in aggregator.queues()
    assert await aggregator.merger.merge(jobs) == [Release()] * 3  # that were claimed before
    assert isinstance((await aggregator.merger.merge([merge_job(other, 0)]))[0], Commit)
    assert other.merge_queue in aggregator.queues()


async def test_files_of_a_collection_go_after_its_writer_was_closed(
    aggregator: Aggregator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = await create(aggregator, "books")
    folder = tmp_path / collection.uid
    close, closed = PartitionWriter.close, []

    def noting(writer: PartitionWriter) -> None:
        closed.append(folder.exists())
        close(writer)

    monkeypatch.setattr(PartitionWriter, "close", noting)
    await delete(aggregator, "books")
    assert closed == [True]
    assert not folder.exists()


async def test_files_that_could_not_be_removed_are_removed_later(
    aggregator: Aggregator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = await create(aggregator, "books")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        await delete(aggregator, "books")
    left = tmp_path / f"{collection.uid}.deleted"
    assert left.exists()
    maintenance = asyncio.create_task(aggregator.maintain())
    await eventually(lambda: not left.exists())
    maintenance.cancel()


@pytest.mark.parametrize("step", ["catalogue", "writers"])
def test_a_start_that_fails_gives_the_lease_back(
    client: redis.Redis, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    if step == "catalogue":
        (tmp_path / INDEX_FOLDER).mkdir()
        (tmp_path / INDEX_FOLDER / FILE_NAME).write_bytes(b"x" * 8192)
    else:

        def full(aggregator: Aggregator) -> None:
            assert client.exists(keys.writer("main"))
            raise Unavailable("the disk is full")

        monkeypatch.setattr(Aggregator, "open", full)
    with pytest.raises(CorruptManifest if step == "catalogue" else Unavailable):
        run_aggregator(AggregatorConfig(redis_url, tmp_path))
    assert not client.exists(keys.writer("main"))


async def test_a_redis_that_lost_its_data_is_not_taken_for_one_without_collections(
    aggregator: Aggregator, client: redis.Redis, redis_async: redis.asyncio.Redis
) -> None:
    await create(aggregator, "books")
    directory = Directory(redis_async)
    with pytest.raises(UnknownCollection):
        await directory.collection("films")
    assert [found.name for found in await directory.collections()] == ["books"]
    client.flushall()
    for lookup in (directory.collection("books"), directory.collections()):
        with pytest.raises(Unavailable) as raised:
            await lookup
        assert raised.value.retry_after_s
    await asyncio.to_thread(aggregator.keeper.publish)
    assert (await directory.collection("books")).name == "books"
    await delete(aggregator, "books")
    assert await directory.collections() == []


async def test_one_that_was_frozen_leaves_the_next_ones_copy_alone(
    client: redis.Redis, tmp_path: Path
) -> None:
    stale = asyncio.Event()
    frozen = Aggregator(Catalog.open(tmp_path, token=1), client, 1, on_stale=stale.set)
    await frozen.writers.on_disk(frozen.open)
    heir = Aggregator(Catalog.open(tmp_path, token=2), client, 2, on_stale=lambda: None)
    await heir.writers.on_disk(heir.open)
    await create(heir, "books")
    with pytest.raises(StaleWriter):
        await asyncio.to_thread(frozen.keeper.publish)
    assert published(client, "-") == {"books"}
    # A deletion that it had in hand is not settled, and touches nothing.
    late = asyncio.create_task(frozen.keeper.delete(catalog_job(payloads.DELETE, "books")))
    await stale.wait()
    late.cancel()
    assert published(client, "-") == {"books"}
    for one in (frozen, heir):
        await asyncio.to_thread(one.close)
