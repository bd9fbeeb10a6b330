"""The search process: what it holds of collections, and for how long."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from few_files import few_files_left
from index_oracle import DIMENSION, open_writer, shard, vector_of

from vecfleet.common.errors import InvalidInput, ReplyTooLarge, Unavailable, UnknownCollection
from vecfleet.common.limits import search_tokens
from vecfleet.worker import search_handler
from vecfleet.worker.job import Answer, Failure, Release
from vecfleet.worker.search_handler import SearchHandler
from vecfleet.worker.segment import Segment

UID = "c0ffee" * 5 + "00"


async def test_files_of_a_deleted_collection_are_released(tmp_path):
    directory = tmp_path / UID / "0"
    writer = open_writer(directory)
    writer.apply([shard("s", [(f"d{n}", 1) for n in range(100)])])
    writer.close()
    handler = SearchHandler(tmp_path)
    job = SimpleNamespace(payload={"uid": UID})
    assert (await handler.stats(job)).body["documents"] == 100
    handler.forget_deleted()
    assert (await handler.stats(job)).body["documents"] == 100
    del writer
    shutil.rmtree(directory)
    gc.collect()
    assert str(directory) in maps()
    handler.forget_deleted()
    gc.collect()
    assert str(directory) not in maps()
    with pytest.raises(UnknownCollection):
        await handler.stats(job)
    handler.close()


async def test_a_collection_that_is_deleted_while_it_is_opened_is_not_there(tmp_path, monkeypatch):
    """SQLite sees its files go, and says that the disk fails."""
    directory = tmp_path / UID / "0"
    directory.mkdir(parents=True)

    def open_late(path):
        shutil.rmtree(tmp_path / UID)
        raise Unavailable("manifest.db cannot be used now: disk I/O error")

    monkeypatch.setattr(search_handler.PartitionReader, "open", open_late)
    handler = SearchHandler(tmp_path)
    with pytest.raises(UnknownCollection):
        await handler.stats(SimpleNamespace(payload={"uid": UID}))
    handler.close()


@pytest.mark.parametrize("uid", [["a"], {"a": 1}, None, 7, "../../etc"])
def test_a_search_with_a_hostile_uid_fails_alone(tmp_path, uid):
    writer = open_writer(tmp_path / UID / "0")
    writer.apply([shard("s", [("a", 1)])])
    writer.close()
    handler = SearchHandler(tmp_path)
    payload = {"uid": UID, "vectors": vector_of("a", 1, DIMENSION).tobytes(), "top_k": 1}
    good = SimpleNamespace(id="good", payload=payload, queue_ms=0.0)
    bad = SimpleNamespace(id="bad", payload={**payload, "uid": uid}, queue_ms=0.0)
    first, second, third = handler.search([good, bad, good])
    assert isinstance(first, Answer) and isinstance(third, Answer)
    assert isinstance(second, Failure) and isinstance(second.error, InvalidInput)
    handler.close()


@pytest.fixture
def filled(tmp_path):
    """A handler over 100 documents of about 90 bytes each, as an answer counts them."""
    writer = open_writer(tmp_path / UID / "0")
    writer.apply([shard("s", [(f"d{n}", 1) for n in range(100)])])
    writer.close()
    handler = SearchHandler(tmp_path)
    yield handler
    handler.close()


def asking(name, top_k, queries=1):
    vectors = vector_of("d1", 1, DIMENSION).tobytes() * queries
    payload = {"uid": UID, "vectors": vectors, "top_k": top_k}
    return SimpleNamespace(id=name, payload=payload, queue_ms=0.0)


async def test_a_collection_that_no_file_is_left_for_fails_alone(filled, tmp_path):
    other = "ab" * 16
    writer = open_writer(tmp_path / other / "0")
    writer.apply([shard("s", [("d1", 1)])])
    changed = asking("changed", 1)
    changed.payload["uid"] = other
    assert isinstance(filled.search([changed])[0], Answer)
    writer.apply([shard("t", [("d2", 1)])])
    good = asking("good", 1)
    assert isinstance(filled.search([good])[0], Answer)
    new = asking("new", 1)
    new.payload["uid"] = "cd" * 16
    open_writer(tmp_path / new.payload["uid"] / "0").close()
    with few_files_left(0):
        first, second, third, fourth = filled.search([good, changed, new, good])
        with pytest.raises(Unavailable):
            await filled.stats(changed)
    assert isinstance(first, Answer) and isinstance(fourth, Answer)
    for failure in (second, third):
        assert isinstance(failure, Failure) and isinstance(failure.error, Unavailable)
    assert all(isinstance(outcome, Answer) for outcome in filled.search([changed, new]))
    writer.close()


def test_a_search_whose_texts_are_too_many_bytes_fails_alone(filled, monkeypatch):
    monkeypatch.setattr(search_handler, "MAX_REPLY_BYTES", 3000)
    jobs = [asking("few", 10), asking("many", 100), asking("often", 10, queries=10)]
    jobs.append(asking("last", 10))
    few, many, often, last = filled.search(jobs)
    for answer in (few, last):
        assert isinstance(answer, Answer)
        assert len(answer.body["hits"][0]) == 10
        assert 500 < answer.size < 1500
    for failure in (many, often):
        assert isinstance(failure, Failure) and isinstance(failure.error, ReplyTooLarge)
        assert failure.error.field == "top_k"


def test_texts_are_read_no_further_than_an_answer_may_grow(filled, monkeypatch):
    monkeypatch.setattr(search_handler, "MAX_REPLY_BYTES", 1000)
    read = []
    original = Segment.read

    def count(self, row):
        read.append(row)
        return original(self, row)

    monkeypatch.setattr(Segment, "read", count)
    (outcome,) = filled.search([asking("many", 100)])
    assert isinstance(outcome, Failure)
    assert len(read) < 20


def test_answers_that_are_too_many_bytes_together_wait_for_their_turn(filled, monkeypatch):
    monkeypatch.setattr(search_handler, "_ANSWERS_BYTES", 10_000)
    jobs = [asking(f"j{n}", 50 if n % 2 else 49) for n in range(8)]
    outcomes = filled.search(jobs)
    answered = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    assert 1 <= len(answered) <= 3
    assert sum(isinstance(outcome, Release) for outcome in outcomes) == 8 - len(answered)
    again = filled.search([j for j, o in zip(jobs, outcomes, strict=True) if o == Release()])
    assert any(isinstance(outcome, Answer) for outcome in again)


async def test_documents_that_are_too_many_bytes_are_refused(filled, monkeypatch):
    monkeypatch.setattr(search_handler, "MAX_REPLY_BYTES", 3000)
    ids = [f"d{n}" for n in range(100)]
    found = await filled.get(SimpleNamespace(payload={"uid": UID, "ids": [*ids[:20], "x"]}))
    assert [entry and entry["id"] for entry in found.body["documents"]] == [*ids[:20], None]
    assert found.size > 1000
    with pytest.raises(ReplyTooLarge) as caught:
        await filled.get(SimpleNamespace(payload={"uid": UID, "ids": ids}))
    assert caught.value.field == "ids"


@pytest.mark.parametrize(
    ("queries", "top_k", "exact", "tokens"),
    [
        (1, 1, False, 1),
        (1, 10, False, 1),
        (1, 1000, False, 100),
        (64, 10, False, 64),
        (1, 10, True, 10),
        (1024, 1000, True, 1_024_000),
    ],
)
def test_a_search_counts_by_what_it_may_answer(queries, top_k, exact, tokens):
    assert search_tokens(queries, top_k, exact=exact) == tokens


def maps() -> str:
    return Path("/proc/self/maps").read_text()
