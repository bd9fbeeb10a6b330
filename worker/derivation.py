"""Building the derived index of one segment: train where needed, add, measure, store.

``effort`` (nprobe or efSearch) is the smallest at which about 200 queries find, among the
candidates that are rescored, ``recall_target`` of their ten nearest rows. The queries are the
caller's, where there are enough, else made up of stored rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vecfleet.worker import ann
from vecfleet.worker.durable import CrashPoint, file_crc, no_crash, publish, write_all
from vecfleet.worker.exact_scan import Scores, scan, widen
from vecfleet.worker.index_policy import IndexRequest, sample_rows
from vecfleet.worker.open_segment import OpenSegment
from vecfleet.worker.partition_state import IndexEntry, Template
from vecfleet.worker.rows import RowNumbers

PIECE_ROWS = 16_384
QUERY_COUNT = 200
MIN_QUERIES = 50  # fewer queries of the caller say too little
# Questions lie between documents, not beside one: their nearest neighbours are in many lists. An
# effort measured with rows moved by noise found 0.75 of what real questions ask for, not 0.98; with
# these, it found 0.99.
QUERY_ROWS = 4  # stored rows whose mean makes a question
QUERY_NOISE = 0.75  # length of what is added to the mean, of length 1
NEIGHBOURS = 10
MAX_HNSW_EFFORT = 1024


@dataclass(frozen=True, slots=True)
class Derived:
    """The index that was built, and the template if one was trained."""

    index: IndexEntry
    template: Template | None


def derive(
    directory: Path,
    part: OpenSegment,
    sources: Mapping[int, OpenSegment],
    request: IndexRequest,
    queries: Scores | None = None,
    merged: Sequence[tuple[OpenSegment, IndexEntry | None]] = (),
    crash: CrashPoint = no_crash,
) -> Derived:
    """Build and publish the index of ``part``; a template is trained on rows of ``sources``.

    ``merged`` are the segments that ``part`` was made of, with their indexes: the codes of those
    that have the same template are reused. Raises ``Unavailable`` when a file cannot be written,
    ``CorruptData``.
    """
    vectors = part.segment.rows.vectors
    template: Template | None = None
    if request.kind == "hnsw":
        digest = ""
        everything = np.arange(len(vectors))
        index = ann.build_hnsw(vectors.shape[1], (v for v, _ in _pieces(vectors, everything)))
    else:
        if request.template is None:
            raw, template = _train(directory, sources, request)
        else:
            raw = (directory / request.template).read_bytes()
        digest = _digest(raw)
        reused, fresh = _reuse(directory, part, merged, digest)
        index = ann.build_ivf(raw, _pieces(vectors, fresh), reused)
    crash("index built")
    path = directory / request.file
    _publish(path, index, crash)
    del index
    effort = _calibrate(path, part, request, queries)
    crash("index measured")
    raw_size = path.stat().st_size
    crc = file_crc(path)
    entry = IndexEntry(part.entry.number, request.file, request.kind, digest, effort, raw_size, crc)
    return Derived(entry, template)


def recall(
    index: ann.DerivedIndex, queries: Scores, truth: NDArray[np.int64], effort: int
) -> float:
    """The part of ``truth`` (q, k), row numbers, that is among the candidates."""
    lists = ann.NearestLists({index.template: effort})
    found = index.candidates(queries, truth.shape[1], None, lists, effort)
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True))
    return hits / truth.size


def made_up(vectors: NDArray[np.float16], count: int, seed: int) -> Scores:
    """``count`` queries among the stored rows, normalised, as questions lie among documents."""
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(vectors), size=(min(count, len(vectors)), QUERY_ROWS))
    order = np.unique(chosen)  # read in the order of the file
    rows = widen(vectors[order])[np.searchsorted(order, chosen)]
    noise = generator.standard_normal((len(chosen), vectors.shape[1])).astype(np.float32)
    queries = _unit(rows.mean(axis=1)) + QUERY_NOISE * _unit(noise)
    return _unit(queries)


def _unit(rows: Scores) -> Scores:
    """Rows of length 1; what is zero stays so."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Scores = rows / np.maximum(lengths, np.float32(1e-12))
    return unit


def _train(
    directory: Path, sources: Mapping[int, OpenSegment], request: IndexRequest
) -> tuple[bytes, Template]:
    raw = ann.train_ivf(_sample(sources, sample_rows(request.nlist)), request.nlist)
    digest = _digest(raw)
    file = f"template-{digest}.faiss"
    publish(directory / file, lambda handle: write_all(handle, memoryview(raw)))
    template = Template(
        digest, file, request.kind, request.nlist, request.trained_rows, zlib.crc32(raw)
    )
    return raw, template


def _sample(sources: Mapping[int, OpenSegment], count: int) -> NDArray[np.float16]:
    """Random visible rows of all segments, in equal parts."""
    generator = np.random.default_rng(0)
    total = sum(part.liveness.visible_count for part in sources.values())
    pieces: list[NDArray[np.float16]] = []
    for part in sources.values():
        visible = np.flatnonzero(part.liveness.visible)
        share = min(len(visible), -(-count * len(visible) // max(total, 1)))
        chosen = np.sort(generator.choice(visible, share, replace=False))
        pieces.append(part.segment.rows.vectors[chosen])
    return np.concatenate(pieces)


def _calibrate(path: Path, part: OpenSegment, request: IndexRequest, queries: Scores | None) -> int:
    """The smallest effort that reaches the target."""
    index = ann.DerivedIndex(path, request.kind, 1, "")
    vectors = part.segment.rows.vectors
    if queries is None or len(queries) < MIN_QUERIES:
        documents = vectors
        if part.segment.rows.tombstones.any():
            documents = vectors[~part.segment.rows.tombstones]
        queries = made_up(documents, QUERY_COUNT, seed=part.entry.number)
    queries = queries[:QUERY_COUNT]
    truth = scan(vectors, queries, min(NEIGHBOURS, len(vectors)), ~part.segment.rows.tombstones)[1]
    low, high = 1, request.nlist if request.kind == "ivf" else MAX_HNSW_EFFORT
    while low < high:
        middle = (low + high) // 2
        if recall(index, queries, truth, middle) >= request.recall_target:
            high = middle
        else:
            low = middle + 1
    return low


def _reuse(
    directory: Path,
    part: OpenSegment,
    merged: Sequence[tuple[OpenSegment, IndexEntry | None]],
    template: str,
) -> tuple[list[tuple[Path, RowNumbers]], RowNumbers]:
    """Indexes to take codes from, with where their rows went, and the rows that remain."""
    remaining = np.ones(len(part.segment), np.bool_)
    reused: list[tuple[Path, RowNumbers]] = []
    everything = np.ones(len(part.segment), np.bool_)
    for source, entry in merged:
        if entry is None or entry.template != template:
            continue
        living = np.flatnonzero(source.liveness.alive)
        moved = np.full(len(source.segment), -1, np.int64)
        # One row of an id lives among all inputs, so its key finds it in the output.
        moved[living] = part.segment.find(source.segment.rows.keys[living], everything)
        remaining[moved[moved >= 0]] = False
        reused.append((directory / entry.file, moved))
    return reused, np.flatnonzero(remaining)


def _pieces(
    vectors: NDArray[np.float16], rows: RowNumbers
) -> Iterator[tuple[NDArray[np.float16], RowNumbers]]:
    for start in range(0, len(rows), PIECE_ROWS):
        some = rows[start : start + PIECE_ROWS]
        yield vectors[some], some


def _publish(path: Path, index: object, crash: CrashPoint) -> None:
    publish(
        path,
        lambda handle: ann.store(index, lambda data: write_all(handle, memoryview(data))),
        crash,
    )


def _digest(raw: bytes) -> str:
    return blake2b(raw, digest_size=8).hexdigest()
