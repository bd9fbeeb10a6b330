"""Two maintenance children that end at the same moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from index_oracle import Oracle, check_reader, open_writer, settle, shard

from vecfleet.worker.compaction import FAN_IN
from vecfleet.worker.maintenance import Result
from vecfleet.worker.maintenance_child import MaintenanceChild
from vecfleet.worker.partition_reader import PartitionReader


def test_files_of_a_job_that_ended_with_another_are_kept(tmp_path: Path) -> None:
    writer, oracle = open_writer(tmp_path), Oracle()
    upkeep = writer._upkeep
    children = (upkeep._mergers[True], upkeep._indexer)
    polls = {child: child.poll for child in children}
    ended: dict[MaintenanceChild, Result] = {}

    def together(child: MaintenanceChild) -> Callable[[], Result | None]:
        def poll() -> Result | None:
            if child is children[0]:  # the first to be asked; the other is told the same
                for each in children:
                    if each not in ended and (result := polls[each]()) is not None:
                        ended[each] = result
            return ended[child] if len(ended) == len(children) else None

        return poll

    for child in children:
        child.poll = together(child)  # type: ignore[method-assign]
    shards = {"large": [(f"large-{n}", 1) for n in range(400)]}
    shards |= {f"small-{n}": [(f"small-{n}", 1)] for n in range(FAN_IN)}
    for name, documents in shards.items():
        writer.apply([shard(name, documents)])
        oracle.apply(name, documents)
        writer.maintain()  # the large one is indexed while the others are merged
    assert len(upkeep.jobs) == 2
    while not (report := writer.maintain()).committed:
        assert not report.failed
        time.sleep(0.005)  # the children need the cores
    assert len(report.committed) == 2
    assert {path.name for path in tmp_path.iterdir()} >= writer.state.files
    for child in children:
        child.poll = polls[child]  # type: ignore[method-assign]
    assert settle(writer) == []
    assert writer.stats().indexed_documents == 400
    reader = PartitionReader.open(tmp_path)
    check_reader(reader, oracle)
    reader.close()
    writer.close()
