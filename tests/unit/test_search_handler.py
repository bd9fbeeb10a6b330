"""The search process: what it holds of collections, and for how long."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from index_oracle import open_writer, shard

from vecfleet.common.errors import UnknownCollection
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


def maps() -> str:
    return Path("/proc/self/maps").read_text()
