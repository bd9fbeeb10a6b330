"""A submission against a real Redis: each document once, whatever is lost, full or away."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest
from producer_backend import CARD, SPACE, Backend
from servers import eventually

from vecfleet.common import codec, keys
from vecfleet.common.admission import Admission
from vecfleet.common.collection import Collection
from vecfleet.common.errors import (
    Conflict,
    DeadlineExceeded,
    InvalidInput,
    JobCancelled,
    QueueFull,
    RedisUnavailable,
    UnknownCollection,
)
from vecfleet.common.redis_client import connect_async
from vecfleet.producer import (
    AsyncProducer,
    Producer,
    Rejected,
    SubmitOptions,
    deleting,
    sending,
    watching,
)
from vecfleet.producer.asking import query_vector


def rows(count: int, text: str = "text", first: int = 0) -> list[dict[str, str]]:
    return [{"id": f"d{i}", "text": f"{text} {i}"} for i in range(first, first + count)]


def expected(documents: list[dict[str, str]]) -> dict[str, str]:
    return {row["id"]: row["text"] for row in documents}


def texts(backend: Backend) -> dict[str, str]:
    return {document_id: text for document_id, (_, text) in backend.rows.items()}


@pytest.fixture
def quick_looks(monkeypatch):
    """Answers count as overdue at once, so that a look into Redis decides."""
    monkeypatch.setattr(sending, "LOOK_AGAIN_S", 0.05)
    monkeypatch.setattr(watching, "LOOK_AGAIN_S", 0.05)
    monkeypatch.setattr(watching, "_LOOK_S", 0.05)


@pytest.fixture
async def backend(redis_url):
    async with connect_async(redis_url) as client, Backend(client) as backend:
        yield backend


@pytest.fixture
async def producer(redis_url, backend):
    async with AsyncProducer(redis_url) as producer:
        yield producer


async def test_documents_are_committed_and_counted(producer, backend):
    documents = [*rows(600), {"id": "bad", "text": ""}, {"id": "x", "text": "y", "z": 1}]
    progress, rejects = [], []
    result = await producer.submit(
        documents, collection="c", on_progress=progress.append, on_reject=rejects.append
    )
    assert (result.documents, result.committed, result.rejected) == (602, 600, 2)
    assert not result.is_complete and not result.interrupted
    assert texts(backend) == expected(rows(600))
    assert [(r.line, r.code) for r in rejects] == [(601, "empty_text"), (602, "unknown_field")]
    assert progress[-1].committed == 600 and progress[-1].in_flight == 0
    fleet = await producer.fleet()
    known = await fleet.submissions.get(result.submission)
    assert (known.state, known.documents, known.committed) == ("done", 600, 600)
    assert not await fleet.redis.keys("rq:job:*")


async def test_an_async_stream_and_an_empty_one(producer, backend):
    async def stream():
        for row in rows(300):
            yield row

    assert (await producer.submit(stream(), collection="c")).committed == 300
    empty = await producer.submit([], collection="c")
    assert empty.documents == 0 and empty.is_complete
    with pytest.raises(UnknownCollection):
        await producer.submit([], collection="nope")


async def test_the_input_s_own_error_comes_through_after_what_was_sent(producer, backend):
    def failing():
        yield from rows(5000)
        raise RuntimeError("the database went away")

    with pytest.raises(RuntimeError, match="went away"):
        await producer.submit(failing(), collection="c")
    assert len(backend.rows) == 4864  # the whole blocks before it


async def test_the_same_submission_again_sends_nothing(producer, backend):
    documents = rows(700)
    for _ in range(2):
        result = await producer.submit(documents, collection="c", submission="nightly")
        assert (result.documents, result.committed) == (700, 700)
    assert len(backend.jobs) == len(set(backend.jobs)) == 3


async def test_other_documents_under_the_same_name_are_refused(producer, backend, tmp_path):
    await producer.submit(rows(600), collection="c", submission="nightly")
    with pytest.raises(Conflict, match="other documents"):
        await producer.submit(rows(600, "new"), collection="c", submission="nightly")
    with pytest.raises(Conflict, match="other documents"):
        await producer.submit(rows(700), collection="c", submission="nightly")
    journal = tmp_path / "j"
    await producer.submit(rows(600), collection="c", submission="weekly", journal=journal)
    with pytest.raises(Conflict, match="other documents"):
        await producer.submit(rows(700), collection="c", submission="weekly", journal=journal)


async def test_lost_answers_are_looked_up(producer, backend, quick_looks):
    backend.drop_answers = True
    backend.refused_ids = {"d3"}
    rejects: list[Rejected] = []
    result = await producer.submit(rows(1000), collection="c", on_reject=rejects.append)
    assert (result.committed, result.failed) == (999, 1)
    assert [r.id for r in rejects] == ["d3"]
    assert len(backend.jobs) == 4


async def test_lost_jobs_are_sent_again_under_their_version(producer, backend, quick_looks):
    backend.lose_next = 3
    result = await producer.submit(rows(1500), collection="c")
    assert result.committed == 1500
    assert texts(backend) == expected(rows(1500))
    assert len(backend.jobs) == len(set(backend.jobs)) == 6
    versions = [backend.rows[f"d{i}"][0] for i in range(1500)]
    assert versions == sorted(versions)  # also those that were sent last


async def test_a_full_queue_is_waited_for(redis_url, backend):
    small = Admission(max_tokens=2000)
    async with AsyncProducer(redis_url, admission=small) as producer:
        result = await producer.submit(rows(5000), collection="c")
        assert result.committed == 5000
        backend.go.clear()
        seen = []
        with pytest.raises(QueueFull, match="gave up"):
            await producer.submit(
                rows(5000, "other"),
                collection="c",
                options=SubmitOptions(patience_s=0.5, only_changed=False),
                on_progress=seen.append,
            )
        assert any("queue" in progress.waiting for progress in seen)


async def test_the_window_bounds_what_is_in_flight(producer, backend):
    backend.go.clear()
    seen = []
    options = SubmitOptions(max_blocks=3)
    running = asyncio.create_task(
        producer.submit(rows(5000), collection="c", options=options, on_progress=seen.append)
    )
    fleet = await producer.fleet()
    queue = keys.queue_list(keys.embed_queue(backend.collection.spec.space, "bulk"))
    await eventually(lambda: seen and seen[-1].in_flight == 3 * 256)

    async def all_queued() -> bool:  # they count as in flight before they are
        return await fleet.redis.llen(queue) == 3

    await eventually(all_queued)
    backend.go.set()
    assert (await running).committed == 5000
    assert max(progress.in_flight for progress in seen) == 3 * 256


async def test_unchanged_documents_are_left_out(producer, backend):
    await producer.submit(rows(1000), collection="c")
    backend.merged.clear()
    changed = rows(1000)
    changed[700]["text"] = "changed"
    result = await producer.submit([*changed, {"id": "new", "text": "x"}], collection="c")
    assert (result.documents, result.committed, result.unchanged) == (1001, 2, 999)
    assert [ids for _, ids in backend.merged] == [["d700"], ["new"]]
    everything = await producer.submit(
        changed, collection="c", options=SubmitOptions(only_changed=False)
    )
    assert everything.committed == 1000


async def test_a_later_line_wins_also_where_it_says_what_was_there(producer, backend):
    await producer.submit([{"id": "x", "text": "A"}, *rows(10)], collection="c")
    twice = [{"id": "x", "text": "B"}, *rows(300), {"id": "x", "text": "A"}]
    result = await producer.submit(twice, collection="c")
    assert texts(backend)["x"] == "A"
    assert result.unchanged == 10


async def test_given_versions_are_never_left_out(redis_url):
    async with (
        connect_async(redis_url) as client,
        Backend(client, versions="given"),
        AsyncProducer(redis_url) as producer,
    ):
        for version in (5, 6):
            document = {"id": "a", "text": "same", "version": version}
            assert (await producer.submit([document], collection="c")).committed == 1
        with pytest.raises(InvalidInput, match="version"):
            await producer.delete_documents("c", ["a"])
        assert await producer.delete_documents("c", ["a"], version=7) == 1


async def test_refused_documents_are_told_with_their_places(producer, backend):
    backend.refused_ids = {"d10", "d300"}
    backend.failing_ids = {"d600"}
    rejects: list[Rejected] = []
    result = await producer.submit(rows(700), collection="c", on_reject=rejects.append)
    assert (result.committed, result.failed) == (510, 190)
    long = {(r.line, r.id) for r in rejects if r.code == "text_too_long"}
    assert long == {(11, "d10"), (301, "d300")}
    assert len([r for r in rejects if r.code == "engine_failed"]) == 188


async def test_a_stop_waits_for_what_is_in_flight_and_can_be_continued(producer, backend, tmp_path):
    journal = tmp_path / "j"
    backend.most_blocks = 2
    stop = asyncio.Event()
    options = SubmitOptions(max_blocks=4)
    running = asyncio.create_task(
        producer.submit(rows(5000), collection="c", journal=journal, options=options, stop=stop)
    )
    await eventually(lambda: len(backend.merged) == 2)
    stop.set()
    backend.most_blocks = None
    result = await running
    assert result.interrupted and 0 < result.committed == len(backend.rows) < 5000
    again = await producer.submit(
        rows(5000), collection="c", submission=result.submission, journal=journal
    )
    assert (again.submission, again.committed) == (result.submission, 5000)
    assert len(backend.jobs) == len(set(backend.jobs)) == 20


async def test_a_resumed_run_overwrites_nothing_newer(producer, backend, tmp_path, quick_looks):
    journal = tmp_path / "j"
    backend.most_blocks = 1
    documents = rows(2000)
    options = SubmitOptions(max_blocks=2)
    running = asyncio.create_task(
        producer.submit(documents, collection="c", journal=journal, options=options)
    )
    await eventually(lambda: journal.exists() and journal.read_bytes().count(b'"sent"') >= 3)
    running.cancel()  # as a crash: nothing is waited for
    await asyncio.wait([running])
    backend.most_blocks = None
    newer = [{"id": "d1999", "text": "newer"}, {"id": "d300", "text": "newer"}]
    await producer.submit(newer, collection="c", options=SubmitOptions(only_changed=False))
    result = await producer.submit(documents, collection="c", journal=journal)
    assert result.committed == 2000
    assert texts(backend) == {**expected(documents), "d1999": "newer", "d300": "newer"}
    assert len(backend.jobs) == len(set(backend.jobs))


async def test_blocks_of_a_dead_run_are_waited_for_not_sent_twice(redis_url, producer, backend):
    backend.go.clear()
    running = asyncio.create_task(producer.submit(rows(600), collection="c", submission="n"))
    fleet = await producer.fleet()
    queue = keys.queue_list(keys.embed_queue(backend.collection.spec.space, "bulk"))

    async def all_queued() -> bool:
        return await fleet.redis.llen(queue) == 3

    await eventually(all_queued)
    running.cancel()
    await asyncio.wait([running])
    async with AsyncProducer(redis_url) as other:
        second = asyncio.create_task(other.submit(rows(600), collection="c", submission="n"))
        await eventually(lambda: other_is_waiting(other))
        assert await fleet.redis.llen(queue) == 3
        backend.go.set()
        async with asyncio.timeout(20):
            assert (await second).committed == 600
    assert len(backend.jobs) == 3


async def other_is_waiting(producer: AsyncProducer) -> bool:
    return len((await producer.fleet()).box._waiting) >= 3


async def test_a_cancelled_submission_ends(producer, backend, quick_looks):
    backend.go.clear()
    running = asyncio.create_task(producer.submit(rows(600), collection="c", submission="0" * 32))
    fleet = await producer.fleet()
    queue = keys.queue_list(keys.embed_queue(backend.collection.spec.space, "bulk"))

    async def all_queued() -> bool:
        return await fleet.redis.llen(queue) == 3

    await eventually(all_queued)
    await fleet.submissions.cancel("0" * 32)
    with pytest.raises(JobCancelled):
        async with asyncio.timeout(20):
            await running
    with pytest.raises(JobCancelled):
        await producer.submit(rows(600), collection="c", submission="0" * 32)


async def test_a_collection_deleted_on_the_way_is_told(producer, backend):
    fleet = await producer.fleet()
    backend.discards = True
    backend.go.clear()
    running = asyncio.create_task(
        producer.submit(rows(5000), collection="c", options=SubmitOptions(max_blocks=2))
    )
    await eventually(lambda: other_is_sending(fleet, backend))
    await fleet.redis.hdel(keys.collections(), "c")
    backend.go.set()
    with pytest.raises(UnknownCollection, match="deleted"):
        async with asyncio.timeout(20):
            await running


async def other_is_sending(fleet, backend) -> bool:
    queue = keys.embed_queue(backend.collection.spec.space, "bulk")
    return await fleet.redis.llen(keys.queue_list(queue)) == 2


@pytest.mark.parametrize("append_only", [True, False], ids=["aof", "memory only"])
async def test_redis_restarting_loses_nothing(redis_server_factory, quick_looks, append_only):
    server = redis_server_factory(append_only=append_only)
    async with (
        connect_async(server.url) as client,
        Backend(client) as backend,
        AsyncProducer(server.url) as producer,
    ):
        backend.most_blocks = 5
        running = asyncio.create_task(producer.submit(rows(6000), collection="c"))
        await eventually(lambda: len(backend.merged) >= 5)
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start)
        await backend.announce()
        backend.most_blocks = None
        async with asyncio.timeout(20):
            result = await running
        assert result.committed == 6000
        assert texts(backend) == expected(rows(6000))


async def test_redis_away_for_too_long_is_told(redis_server_factory, quick_looks):
    server = redis_server_factory()
    async with (
        connect_async(server.url) as client,
        Backend(client) as backend,
        AsyncProducer(server.url) as producer,
    ):
        backend.go.clear()
        options = SubmitOptions(patience_s=0.3)
        running = asyncio.create_task(producer.submit(rows(300), collection="c", options=options))
        fleet = await producer.fleet()

        async def is_sent() -> bool:
            return bool(await fleet.redis.keys("rq:job:*-1"))

        await eventually(is_sent)
        await asyncio.to_thread(server.stop)
        with pytest.raises(RedisUnavailable, match="gave up"):
            async with asyncio.timeout(20):
                await running


async def test_deletions_and_reads(producer, backend):
    await producer.submit(rows(600), collection="c")
    assert await producer.delete_documents("c", [f"d{i}" for i in range(300)]) == 300
    assert len(backend.rows) == 300
    found = await producer.get("c", ["d1", "d599"])
    assert found[0] is None and found[1].text == "text 599"


async def test_a_deletion_that_gets_no_answer_leaves_no_open_submission(
    redis_url, producer, backend
):
    await producer.submit(rows(300), collection="c")
    backend.drop_answers = True
    async with AsyncProducer(redis_url, timeout_s=3) as producer:
        with pytest.raises(DeadlineExceeded):
            await producer.delete_documents("c", [f"d{i}" for i in range(300)])
        fleet = await producer.fleet()
        assert list(await fleet.submissions.unfinished()) == []


async def answerless_deletion(producer, backend):
    """A deletion that waits for its answer, and its submission, which is open."""
    backend.drop_answers = True
    fleet = await producer.fleet()
    running = asyncio.create_task(producer.delete_documents("c", ["d1"]))

    async def is_settled() -> bool:
        return bool(backend.merged) and not await fleet.redis.keys("rq:job:*")

    await eventually(is_settled)
    (submission,) = await fleet.submissions.unfinished()
    return fleet, running, submission.id


@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
async def test_a_deletion_that_is_cancelled_leaves_no_open_submission(
    redis_url, backend, monkeypatch, again
):
    closing, go = asyncio.Event(), asyncio.Event()
    async with AsyncProducer(redis_url) as producer:
        fleet, running, submission = await answerless_deletion(producer, backend)
        original = fleet.submissions.close

        async def close(*arguments, **named):
            closing.set()
            await go.wait()
            return await original(*arguments, **named)

        monkeypatch.setattr(fleet.submissions, "close", close)
        running.cancel()
        async with asyncio.timeout(30):
            await closing.wait()
        if again:
            running.cancel()
        else:
            go.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        go.set()

        async def is_done():
            return (await fleet.submissions.get(submission)).state == "done"

        await eventually(is_done)


async def test_a_cancelled_deletion_does_not_wait_for_ever(redis_url, backend, monkeypatch):
    monkeypatch.setattr(deleting, "_CLOSE_S", 0.05)
    closing = asyncio.Event()

    async def never(*_, **__):
        closing.set()
        await asyncio.Event().wait()

    async with AsyncProducer(redis_url) as producer:
        fleet, running, _ = await answerless_deletion(producer, backend)
        monkeypatch.setattr(fleet.submissions, "close", never)
        running.cancel()
        done, _ = await asyncio.wait([running], timeout=30)
        assert done and running.cancelled()
        assert closing.is_set()


async def test_a_deletion_that_cannot_be_sent_is_not_waited_for(producer, backend, monkeypatch):
    async def full(*_, **__):
        raise QueueFull("no room")

    fleet = await producer.fleet()
    monkeypatch.setattr(fleet, "enqueue_delete", full)
    with pytest.raises(QueueFull):
        await producer.delete_documents("c", ["d1"])
    assert not fleet.box._waiting
    assert list(await fleet.submissions.unfinished()) == []


async def test_a_producers_questions_are_its_tenants(redis_url, backend):
    asked = {
        "embed": lambda producer: producer.embed(["a"]),
        "rerank": lambda producer: producer.rerank("a", ["b"]),
    }
    async with AsyncProducer(redis_url, tenant="acme") as producer:
        fleet = await producer.fleet()
        both = replace(CARD, tasks=("embed", "rerank"))
        await fleet.redis.set(keys.model(CARD.name), codec.dumps(both.to_wire()))
        seconds, _ = await fleet.redis.time()
        await fleet.redis.zadd(keys.live(f"rerank.{SPACE}"), {"backend": (seconds + 600) * 1000})
        for task, ask in asked.items():
            asking = asyncio.create_task(ask(producer))
            queue = keys.queue_list(keys.QueueName("acme", task, SPACE, "interactive"))
            await eventually(lambda queue=queue: fleet.redis.llen(queue))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)


async def test_a_question_of_a_tenant_is_embedded_as_its_own(redis_url, backend):
    collection = Collection("c", "u1d", backend.collection.spec, tenant="acme")
    async with AsyncProducer(redis_url, tenant="acme") as producer:
        fleet = await producer.fleet()
        asking = asyncio.create_task(query_vector(fleet, collection, "why?", None))
        queue = keys.queue_list(keys.embed_queue(SPACE, "interactive", "acme"))
        await eventually(lambda: fleet.redis.llen(queue))
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def test_many_producers_share_a_collection(redis_url, backend):
    async def one(name: str) -> int:
        async with AsyncProducer(redis_url, admission=Admission(max_tokens=20_000)) as producer:
            documents = [{"id": f"{name}-{i}", "text": "x"} for i in range(2000)]
            return (await producer.submit(documents, collection="c")).committed

    assert await asyncio.gather(*(one(name) for name in "abcd")) == [2000] * 4
    assert len(backend.rows) == 8000


async def test_the_sync_facade_reads_and_calls_back_in_the_callers_thread(redis_url, backend):
    def work():
        here = threading.current_thread()
        seen = set()

        def documents():
            for row in [*rows(600), {"id": "bad", "text": ""}]:
                seen.add(threading.current_thread())
                yield row

        with Producer(redis_url) as producer:
            result = producer.submit(
                documents(),
                collection="c",
                on_progress=lambda _: seen.add(threading.current_thread()),
                on_reject=lambda _: seen.add(threading.current_thread()),
            )
            assert seen == {here}
            assert producer.get("c", ["d5"])[0].text == "text 5"
            assert [c.name for c in producer.collections()] == ["c"]

            def failing():
                yield from rows(3)
                raise ValueError("mine")

            with pytest.raises(ValueError, match="mine"):
                producer.submit(failing(), collection="c")
        producer.close()
        return result

    result = await asyncio.to_thread(work)
    assert (result.committed, result.rejected) == (600, 1)


async def test_a_callback_that_fails_stops_nothing(producer, backend, caplog):
    def fail(_: object) -> None:
        raise RuntimeError("mine")

    result = await producer.submit(
        [*rows(3), {"id": "bad", "text": ""}], collection="c", on_progress=fail, on_reject=fail
    )
    assert (result.committed, result.rejected) == (3, 1)
    assert "callback" in caplog.text
