"""What the index tests compare with: documents that can be recomputed, and a dict that is right."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vecfleet.worker.digest import content_keys, id_keys
from vecfleet.worker.index_policy import Thresholds
from vecfleet.worker.partition import PartitionWriter
from vecfleet.worker.partition_reader import PartitionReader
from vecfleet.worker.partition_state import PartitionSpec
from vecfleet.worker.shard import Shard, build_shard

DIMENSION = 16
SPEC = PartitionSpec("0" * 32, "space", DIMENSION)
SMALL = Thresholds(exact_work=300 * DIMENSION, large_work=200 * DIMENSION)
"""An IVF from 301 documents on, for segments of 200 rows or more."""


def vector_of(document: str, version: int, dimension: int = DIMENSION) -> np.ndarray:
    """The vector that belongs to this id and version, and to no other."""
    seed = hashlib.sha256(f"{document}|{version}".encode()).digest()
    vector = np.random.default_rng(list(seed)).standard_normal(dimension).astype(np.float32)
    return vector / np.linalg.norm(vector)


def text_of(document: str, version: int) -> str:
    return f"{document} as of {version} " + "word " * (version % 7)


def metadata_of(document: str, version: int) -> bytes | None:
    return b'{"version":%d}' % version if version % 3 == 0 else None


def shard_bytes(
    shard_id: str,
    documents: Iterable[tuple[str, int]],
    deletes: Iterable[tuple[str, int]] = (),
    *,
    space: str = "space",
    dimension: int = DIMENSION,
) -> bytes:
    docs, gone = list(documents), list(deletes)
    return build_shard(
        shard_id,
        space,
        dimension,
        ids=[d for d, _ in docs],
        texts=[text_of(*d) for d in docs],
        vectors=np.array([vector_of(*d, dimension) for d in docs], np.float32).reshape(
            len(docs), dimension
        ),
        versions=[v for _, v in docs],
        metadata=[metadata_of(*d) for d in docs],
        deleted_ids=[d for d, _ in gone],
        deleted_versions=[v for _, v in gone],
    )


def shard(*args, **kwargs) -> Shard:
    return Shard.parse(shard_bytes(*args, **kwargs))


@dataclass
class Oracle:
    """The right answer: of each id the highest version, of equal ones the latest."""

    latest: dict[str, tuple[int, bool]] = field(default_factory=dict)  # version, deleted
    applied: set[str] = field(default_factory=set)

    def apply(
        self,
        shard_id: str,
        documents: Iterable[tuple[str, int]],
        deletes: Iterable[tuple[str, int]] = (),
    ) -> None:
        if shard_id in self.applied:
            return
        self.applied.add(shard_id)
        for rows, deleted in ((documents, False), (deletes, True)):
            for document, version in rows:
                if document not in self.latest or self.latest[document][0] <= version:
                    self.latest[document] = (version, deleted)

    def living(self) -> dict[str, int]:
        return {d: version for d, (version, deleted) in self.latest.items() if not deleted}


def check_reader(reader: PartitionReader, oracle: Oracle) -> None:
    """Every way of reading gives what the oracle holds, and nothing else."""
    living = oracle.living()
    stored = list(reader.documents())
    assert {d.id: d.version for d in stored} == living
    assert len(stored) == len(living) == reader.stats().documents
    for document in stored:
        assert document.text == text_of(document.id, document.version)
        assert document.metadata == metadata_of(document.id, document.version)
    ids = sorted(oracle.latest)
    if not ids:
        return
    found = [(ids[place], document) for place, document in reader.read(ids)]
    assert {d: document.version for d, document in found} == living
    assert all(d == document.id for d, document in found)
    present, vectors = reader.vectors(id_keys(ids))
    for document, here, vector in zip(ids, present, vectors, strict=True):
        assert here == (document in living)
        if here:
            want = vector_of(document, living[document])
            assert np.allclose(vector.astype(np.float32), want, atol=1e-3)
    contents = content_keys(
        [text_of(d, living.get(d, 0)) for d in ids], [metadata_of(d, living.get(d, 0)) for d in ids]
    )
    assert [d in living for d in ids] == reader.unchanged(id_keys(ids), contents).tolist()
    sample = sorted(living)[:: max(1, len(living) // 20)]
    if sample:
        queries = np.array([vector_of(d, living[d]) for d in sample])
        for document, hits in zip(sample, reader.search(queries, 1, exact=True), strict=True):
            (hit,) = hits
            assert hit.id == document
            assert hit.score > 0.999


def check_liveness(reader: PartitionReader) -> None:
    """Deaths that were followed are those that comparing all versions gives."""
    rows = []
    for part in reader._present().parts:
        for row in range(len(part.segment)):
            order = (int(part.segment.rows.versions[row]), part.entry.sequence, row)
            rows.append((part.segment.rows.id(row), order, bool(part.liveness.alive[row])))
    winners: dict[str, tuple] = {}
    for document, order, _ in rows:
        winners[document] = max(winners.get(document, order), order)
    assert [(d, o) for d, o, alive in rows if alive] == [
        (d, o) for d, o, _ in rows if winners[d] == o
    ]


def settle(writer: PartitionWriter, *, deadline_s: float = 60.0, **kwargs) -> list[str]:
    """Run maintenance until nothing is left to do; returns what failed on the way."""
    failed: list[str] = []
    end = time.monotonic() + deadline_s
    while True:
        report = writer.maintain(**kwargs)
        failed += report.failed
        if report.idle or failed:
            return failed
        assert time.monotonic() < end, "maintenance does not come to an end"
        time.sleep(0.005)


def open_writer(directory: Path, token: int = 1, **kwargs) -> PartitionWriter:
    kwargs.setdefault("thresholds", SMALL)
    writer = PartitionWriter.open(directory, kwargs.pop("spec", SPEC), token, **kwargs)
    writer._upkeep._indexer._nice = 0  # on idle cores alone it may never end on a busy machine
    return writer
