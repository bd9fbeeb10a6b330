"""The search process: what it holds of collections, and for how long."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from index_oracle import DIMENSION, open_writer, shard, vector_of

from vecfleet.common.errors import InvalidInput, Unavailable, UnknownCollection
from vecfleet.worker import search_handler
from vecfleet.worker.job import Answer, Failure
from vecfleet.worker.search_handler import SearchHandler

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


def maps() -> str:
    return Path("/proc/self/maps").read_text()
