"""The same life of jobs with a real index behind it, in which each block's documents end.

A merge writes its shard with a real ``PartitionWriter`` before it is settled. The writer dies at
any of its crash points, or between commit and settlement; others take over, and the one that was
replaced still tries. The blocks share their documents, so that the order of versions matters: after
each step the index holds of each id the highest version committed, once, and what was acknowledged
is in it.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from fuzz.found import BLOCKS, EMBED, MERGE, SUB
from fuzz.job_machine import DOCUMENTS, WORKERS, Held, JobMachine
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from index_oracle import SPEC, Oracle, check_reader, shard_bytes

from vecfleet.common.errors import StaleWriter
from vecfleet.worker.partition import PartitionWriter
from vecfleet.worker.partition_reader import PartitionReader
from vecfleet.worker.shard import Shard

POINTS = ("written", "synced", "renamed", "before commit", "committed")
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a flush costs nothing there
_IDS = 5  # of all blocks together


class Died(BaseException):
    """The writer's process is gone."""


class IndexMachine(JobMachine):
    """Enqueue, embed, merge, commit, die, take over, try again."""

    is_hasty = False  # a mutant: the settlement comes first

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="fuzz-index-", dir=_MEMORY)
        self.oracle = Oracle()
        self.token = 0
        self.is_touched = True  # since it was last read
        self.dies_at = ""
        self.replaced: PartitionWriter | None = None
        self.writer = self.open_writer()
        self.stored: dict[str, int] = {}
        self.versions: dict[str, int] = {}

    def teardown(self) -> None:
        for writer in filter(None, (self.writer, self.replaced)):
            writer.close()
        self.folder.cleanup()
        super().teardown()

    def open_writer(self) -> PartitionWriter:
        """The next holder of the partition's lease."""
        self.token += 1
        self.is_touched = True

        def crash(point: str) -> None:
            if point == self.dies_at:
                raise Died(point)

        return PartitionWriter.open(Path(self.folder.name), SPEC, self.token, crash=crash)

    def shard_of(self, held: Held) -> bytes:
        block = int(held.job.id.rpartition("-")[2])
        self.versions[held.job.id] = held.job.version
        documents = [(f"d{(block + i) % _IDS}", held.job.version) for i in range(DOCUMENTS)]
        return shard_bytes(held.job.id, documents)

    def commit(self, held: Held) -> None:
        if not self.is_hasty:
            self.write(held)

    def write(self, held: Held, dies_at: str = "") -> None:
        """Put the shard into the index; whoever does it again, or late, changes nothing."""
        shard = Shard.parse(held.job.payload)
        was_there = shard.shard_id in self.oracle.applied
        self.dies_at, self.is_touched = dies_at, True
        try:
            (outcome,) = self.writer.apply([shard])
            assert outcome.status == ("duplicate" if was_there else "applied"), outcome
        except Died as death:
            if str(death) != "committed":
                return
        finally:
            self.dies_at = ""
        ids = [shard.rows.id(row) for row in range(len(shard))]
        self.oracle.apply(shard.shard_id, [(i, held.job.version) for i in ids])

    @initialize()
    def embed_some(self) -> None:
        self.work(WORKERS[0], EMBED)

    @rule(blocks=st.sets(st.integers(0, BLOCKS - 1), min_size=1, max_size=4))
    def enqueue(self, blocks: set[int]) -> None:
        """A submission that was cancelled takes no more blocks: none comes a second time."""
        left = {n for n in blocks if self.model.state.get(f"{SUB}-{n}") != "cancelled"}
        if left:
            super().enqueue(left)

    @rule(held=JobMachine.claims, point=st.sampled_from(("settled", *POINTS)))
    def merge_and_die(self, held: Held, point: str) -> None:
        """The writer dies on the way to its commit, or after it and before the settlement."""
        if held.job.queue != MERGE:
            return
        if self.is_hasty:
            self.settle(held, "good", False)
        self.write(held, point)
        self.crash(held.worker)
        dead, self.writer = self.writer, self.open_writer()
        dead.close()

    @rule()
    def take_over(self) -> None:
        if self.replaced is not None:
            self.replaced.close()
        self.replaced, self.writer = self.writer, self.open_writer()

    @rule(held=JobMachine.claims)
    def the_replaced_one_goes_on(self, held: Held) -> None:
        if held.job.queue != MERGE or self.replaced is None:
            return
        shard = Shard.parse(held.job.payload)
        if shard.shard_id in self.oracle.applied:
            return  # it may look, and sees that it is there
        self.is_touched = True
        with pytest.raises(StaleWriter):
            self.replaced.apply([shard])

    @rule(worker=st.sampled_from(WORKERS), most=st.sampled_from((2, BLOCKS)), is_late=st.booleans())
    def merge(self, worker: str, most: int, is_late: bool) -> None:
        """All is well, but that the last came first and that the replaced one still tries."""
        if is_late:
            self.take_over()
        for held in reversed(self.claim(worker, MERGE, most).values):
            self.the_replaced_one_goes_on(held)
            self.settle(held, "good", False)

    @invariant()
    def the_index_holds_what_was_committed(self) -> None:
        if not self.is_touched:
            return
        self.is_touched = False
        reader = PartitionReader.open(Path(self.folder.name))
        try:
            check_reader(reader, self.oracle)
            self.stored = {document.id: document.version for document in reader.documents()}
        finally:
            reader.close()

    @invariant()
    def what_was_acknowledged_is_in_the_index(self) -> None:
        for job, state in self.model.state.items():
            if state != "merged":
                continue
            block = int(job.rpartition("-")[2])
            for place in range(DOCUMENTS):
                document = f"d{(block + place) % _IDS}"
                assert self.stored.get(document, 0) >= self.versions[job], (job, document)
