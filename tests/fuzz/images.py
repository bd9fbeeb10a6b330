"""Folders of the index, made once, to be damaged many times.

An image is a folder as the aggregator leaves it on disk, with what every reading of it must give.
``log`` and ``fresh`` were taken from under a running writer, as a kill leaves them: their last
commits stand in SQLite's log alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from index_oracle import DIMENSION, SPEC, metadata_of, open_writer, settle, shard, vector_of

from vecfleet.common.collection import CollectionSpec
from vecfleet.worker import segment
from vecfleet.worker.catalog import Catalog
from vecfleet.worker.digest import content_keys, id_keys
from vecfleet.worker.index_policy import Thresholds
from vecfleet.worker.partition_reader import PartitionReader
from vecfleet.worker.partition_state import PartitionSpec
from vecfleet.worker.search_report import Hit

INDEXED = Thresholds(exact_work=60 * DIMENSION, large_work=50 * DIMENSION)
GRAPHED = Thresholds(1, 50 * DIMENSION, articles_ivf_rows=1, articles_hnsw_rows=2)
WAITING = Thresholds(exact_work=1, large_work=1 << 40)  # every segment waits for its index
ARTICLES = PartitionSpec(SPEC.uid, SPEC.space, SPEC.dimension, "articles")
QUERIES = np.array([vector_of(f"query-{i}", 1) for i in range(4)])
TOP_K = 3


Documents = dict[str, tuple[int, str, bytes | None, bytes]]  # version, text, metadata, vector


@dataclass(frozen=True)
class Seen:
    """What a reader gives: everything that a client could ever see of a partition."""

    documents: Documents
    hits: tuple[Any, ...]
    exact: tuple[Any, ...]
    unchanged: tuple[bool, ...]
    indexed: int = 0
    quarantined: tuple[str, ...] = ()


@dataclass(frozen=True)
class Image:
    """One folder and what it holds."""

    name: str
    directory: Path
    seen: Seen
    thresholds: Thresholds = INDEXED
    spec: PartitionSpec = SPEC
    without: dict[str, Seen] = field(default_factory=dict)  # derived file -> seen without it
    in_file: dict[str, frozenset[str]] = field(default_factory=dict)  # segment -> ids it serves
    earlier: tuple[Documents, ...] = ()  # what each commit before the last has left

    def outside(self, file: str) -> Documents:
        """The documents that do not lie in ``file``."""
        lost = self.in_file.get(file, frozenset())
        return {d: value for d, value in self.seen.documents.items() if d not in lost}


def see(directory: Path, thresholds: Thresholds, ids: list[str]) -> Seen:
    """Read everything; raises what the reader raises."""
    reader = PartitionReader.open(directory, thresholds=thresholds)
    try:
        stats = reader.stats()
        stored = _read(reader)
        got = {ids[place]: document for place, document in reader.read(ids)}
        assert {d: document.id for d, document in got.items()} == {
            d: d for d in set(stored) & set(ids)
        }
        nothing = (0, "", None, b"")
        texts = [stored.get(d, nothing)[1] for d in ids]
        metadata = [stored.get(d, nothing)[2] for d in ids]
        unchanged = reader.unchanged(id_keys(ids), content_keys(texts, metadata))
        return Seen(
            stored,
            _hits(reader.search(QUERIES, TOP_K)) + _hits(reader.search(QUERIES, 1)),
            _hits(reader.search(QUERIES, TOP_K, exact=True)),
            tuple(unchanged.tolist()),
            stats.indexed_documents,
            stats.quarantined,
        )
    finally:
        reader.close()


def _read(reader: PartitionReader) -> Documents:
    """All documents, each with the vector that is found for its id."""
    stored = {d.id: d for d in reader.documents()}
    found, vectors = reader.vectors(id_keys(sorted(stored)))
    by_id = {d: v.tobytes() for d, v, f in zip(sorted(stored), vectors, found, strict=True) if f}
    return {d.id: (d.version, d.text, d.metadata, by_id[d.id]) for d in stored.values()}


def _hits(found: list[Iterator[Hit]]) -> tuple[Any, ...]:
    return tuple((h.id, round(h.score, 5), h.text, h.metadata) for row in found for h in row)


def all_ids() -> list[str]:
    """The ids that any image holds, and some that none does."""
    return [f"d{i}" for i in range(0, 150, 2)] + ["late", "nobody"]


def make_images(root: Path) -> list[Image]:
    """Every kind of partition, below ``root``."""
    images = [
        _image(root, "indexed", INDEXED, SPEC),
        _image(root, "graph", GRAPHED, ARTICLES),
    ]
    with mock.patch.object(segment, "SIGNS_WORK", 1):
        images.append(_image(root, "signs", WAITING, SPEC, rows=600))
    images.append(_image(root, "log", INDEXED, SPEC, live="old"))
    images.append(_image(root, "fresh", INDEXED, SPEC, rows=60, live="new"))
    return images


def _image(
    root: Path,
    name: str,
    thresholds: Thresholds,
    spec: PartitionSpec,
    rows: int = 120,
    live: str = "",
) -> Image:
    directory, building = root / name, root / f"{name}-building"
    writer = open_writer(building, spec=spec, thresholds=thresholds)
    history: list[Documents] = [{}]
    first = [(f"d{i}", 1 + i % 5) for i in range(rows)]
    writer.apply([shard(f"{name}-{i}", first[i::4]) for i in range(4)])
    history.append(_documents(building))
    if not live:
        assert settle(writer) == []
    if live == "old":  # close folds the log, so that what follows stands in a log of its own
        writer.close()
        writer = open_writer(building, 2, spec=spec, thresholds=thresholds)
    changed = [(f"d{i}", 9 + i % 3) for i in range(0, rows, 5)]
    gone = [(f"d{i}", 20) for i in range(0, rows, 17)]
    writer.apply([shard(f"{name}-changed", changed, gone)])
    history.append(_documents(building))
    writer.apply([shard(f"{name}-more", [(f"d{i}", 3) for i in range(rows, rows + 20)])])
    if live:
        shutil.copytree(building, directory)
        assert (directory / "manifest.db-wal").stat().st_size
    writer.close()
    if not live:
        shutil.copytree(building, directory)
    scratch = root / f"{name}-seen"
    shutil.copytree(directory, scratch)
    seen = see(scratch, thresholds, all_ids())
    assert seen.documents and not seen.quarantined
    assert any(metadata for _, _, metadata, _ in seen.documents.values()) and metadata_of("", 3)
    in_file = _by_segment(scratch)
    assert sorted(d for held in in_file.values() for d in held) == sorted(seen.documents)
    without = {}
    for path in scratch.glob("idx-*"):
        hidden = path.rename(path.with_suffix(".hidden"))
        without[path.name] = see(scratch, thresholds, all_ids())
        hidden.rename(path)
    assert bool(without) == bool(seen.indexed) == (name in ("indexed", "graph"))
    shutil.rmtree(scratch)
    shutil.rmtree(building)
    return Image(name, directory, seen, thresholds, spec, without, in_file, tuple(history))


def _documents(directory: Path) -> Documents:
    reader = PartitionReader.open(directory)
    try:
        return _read(reader)
    finally:
        reader.close()


def _by_segment(directory: Path) -> dict[str, frozenset[str]]:
    """Which file the living row of each document lies in."""
    reader = PartitionReader.open(directory)
    try:
        return {
            part.entry.file: frozenset(
                part.segment.rows.id(int(row)) for row in np.flatnonzero(part.liveness.visible)
            )
            for part in reader._present().parts
        }
    finally:
        reader.close()


def make_catalog(root: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A catalogue with some collections and a deletion, and its records."""
    directory = root / "catalog"
    catalog = Catalog.open(directory)
    for place in range(12):
        spec = CollectionSpec(f"model-{place % 3}", f"{place:016x}", 16 + place)
        catalog.create(f"collection-{place}", spec, "-" if place % 2 else "other")
    catalog.delete("collection-1")
    records = [record.to_wire() for record in catalog.list()]
    catalog.close()
    return directory, records
