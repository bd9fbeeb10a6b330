"""The reader of one partition: search and look-ups over mapped files, while the writer writes.

A reader holds an immutable **view**: the segments of one generation and who of them lives. A
refresh builds the next view from the manifest's deltas and swaps it in; searches that run keep
theirs, and the files they mapped stay readable after compaction has unlinked them. ``refresh`` and
searches may run in different threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from vecfleet.common.errors import CorruptData, CorruptSegment, InvalidVector, Unavailable
from vecfleet.worker.ann import (
    DerivedIndex,
    FlatScan,
    Found,
    NearestLists,
    nothing_found,
)
from vecfleet.worker.digest import id_keys
from vecfleet.worker.durable import file_crc
from vecfleet.worker.exact_scan import Scores, scan
from vecfleet.worker.first_pass import search_by_signs
from vecfleet.worker.index_policy import (
    DEFAULT_THRESHOLDS,
    Thresholds,
    plan_index,
    signs_candidates,
)
from vecfleet.worker.liveness import Liveness
from vecfleet.worker.manifest import Manifest
from vecfleet.worker.partition_state import IndexEntry, SegmentEntry, State
from vecfleet.worker.rows import RowNumbers
from vecfleet.worker.search_report import Hit, ReaderStats, StoredDocument
from vecfleet.worker.segment import Segment

__all__ = ["Hit", "PartitionReader", "ReaderStats", "StoredDocument"]

REFRESH_ATTEMPTS = 10

_Owned = tuple[Scores, RowNumbers, RowNumbers]  # (q, k) scores, places of parts, their rows


@dataclass(frozen=True, slots=True)
class _Part:
    """One segment of a view."""

    entry: SegmentEntry
    segment: Segment
    scan: FlatScan
    liveness: Liveness
    index: DerivedIndex | None = None
    index_entry: IndexEntry | None = None

    def search(self, queries: Scores, k: int, lists: NearestLists) -> Found:
        if not self.liveness.visible_count:
            return nothing_found(len(queries), k)
        if self.index is not None:
            vectors = self.segment.rows.vectors
            return self.index.search(queries, k, self.liveness, vectors, lists)
        return self.scan.search(queries, k, self.liveness)


@dataclass(frozen=True, slots=True)
class _View:
    state: State
    parts: tuple[_Part, ...]
    faults: tuple[str, ...]
    efforts: Mapping[str, int]  # the highest of each template's indexes
    by_signs: frozenset[int]  # places of parts that wait for an index and carry signs


class PartitionReader:
    """Read-only access to one partition; never waits for its writer."""

    def __init__(self, directory: Path, manifest: Manifest, thresholds: Thresholds) -> None:
        """Use ``open``."""
        self.directory = directory
        self._thresholds = thresholds
        self._manifest = manifest
        self._lock = Lock()
        self._releases = ThreadPoolExecutor(1, thread_name_prefix="release")
        self._seen_version = -1
        self._view: _View | None = None

    @classmethod
    def open(
        cls, directory: Path, *, thresholds: Thresholds = DEFAULT_THRESHOLDS
    ) -> PartitionReader:
        """Open the partition in ``directory``.

        Raises ``Unavailable`` before a writer has made it, ``CorruptManifest`` naming the file.
        """
        manifest = Manifest.open_to_read(directory)
        try:
            manifest.check()
            reader = cls(directory, manifest, thresholds)
            reader.refresh()
        except BaseException:
            manifest.close()
            raise
        return reader

    def close(self) -> None:
        """Close the manifest; the maps go with the last view."""
        with self._lock:
            self._manifest.close()
        self._releases.shutdown()

    @property
    def dimension(self) -> int:
        """Length of a query's vector."""
        return self._present().state.spec.dimension

    @property
    def space(self) -> str:
        """The space of the vectors."""
        return self._present().state.spec.space

    def refresh(self) -> bool:
        """See every commit made so far; returns whether there was one. Microseconds if not."""
        with self._lock:
            version = self._manifest.data_version()
            if version == self._seen_version:
                return False
            fault: FileNotFoundError | None = None
            for attempt in range(REFRESH_ATTEMPTS):
                try:
                    last = attempt == REFRESH_ATTEMPTS - 1
                    old, view = self._view, self._next_view(self._view, missing_is_fault=last)
                except FileNotFoundError as error:  # compacted since the manifest was read
                    fault = error
                else:
                    self._view = view
                    self._seen_version = version
                    self._release(old, view)
                    return True
            raise Unavailable(f"{self.directory.name} changes too fast to be read") from fault

    def search(
        self,
        queries: NDArray[np.float32],
        top_k: int,
        threshold: float = -1.0,
        *,
        with_text: bool = True,
    ) -> list[list[Hit]]:
        """The ``top_k`` nearest documents of each query (q, d), best first.

        Hits below the cosine ``threshold`` are left out. Raises ``InvalidVector`` for a wrong
        dimension, NaN or a zero vector; ``CorruptSegment`` when a text cannot be read.
        """
        found = self.look(queries, top_k, threshold, with_text=with_text)
        return [list(hits) for hits in found]

    def exact(
        self,
        queries: NDArray[np.float32],
        top_k: int,
        threshold: float = -1.0,
        *,
        with_text: bool = True,
    ) -> list[list[Hit]]:
        """Like ``search``, by comparing every document: the measure of recall."""
        found = self.look(queries, top_k, threshold, exact=True, with_text=with_text)
        return [list(hits) for hits in found]

    def look(
        self,
        queries: NDArray[np.float32],
        top_k: int,
        threshold: float = -1.0,
        *,
        exact: bool = False,
        with_text: bool = True,
    ) -> list[Iterator[Hit]]:
        """``search`` or ``exact``, for callers that may not want all texts.

        Each query's hits are read when they are asked for; then ``CorruptSegment`` is raised too.
        """
        view = self._present()
        unit = self._unit(view, queries)
        if not exact:
            found = _search(view, unit, top_k)
        else:
            found = [
                _owned(place, scan(part.segment.rows.vectors, unit, top_k, part.liveness.visible))
                for place, part in enumerate(view.parts)
            ]
        if not found:
            return [iter(()) for _ in unit]
        scores, owners, rows = (
            np.concatenate(columns, axis=1) for columns in zip(*found, strict=True)
        )
        return [
            _hits(view, scores[query], owners[query], rows[query], top_k, threshold, with_text)
            for query in range(len(scores))
        ]

    def get(self, ids: Sequence[str]) -> list[StoredDocument | None]:
        """The documents of these ids, None where there is none."""
        result: list[StoredDocument | None] = [None] * len(ids)
        for place, document in self.read(ids):
            result[place] = document
        return result

    def read(self, ids: Sequence[str]) -> Iterator[tuple[int, StoredDocument]]:
        """The documents of these ids, each with the place of its id, read one by one."""
        if not ids:
            return
        for part, asked, rows in _lookup(self._present().parts, id_keys(ids)):
            for place, row in zip(asked.tolist(), rows.tolist(), strict=True):
                text, metadata = part.segment.read(row)
                version = int(part.segment.rows.versions[row])
                yield place, StoredDocument(ids[place], text, metadata, version)

    def documents(self) -> Iterator[StoredDocument]:
        """Every document of the present view, in no order that means anything."""
        for part in self._present().parts:
            for row in np.flatnonzero(part.liveness.visible).tolist():
                text, metadata = part.segment.read(row)
                version = int(part.segment.rows.versions[row])
                yield StoredDocument(part.segment.rows.id(row), text, metadata, version)

    def unchanged(
        self, keys: NDArray[np.uint64], contents: NDArray[np.uint64]
    ) -> NDArray[np.bool_]:
        """Whether the index holds a document of this id (n, 2) with this content (n,); as (n,).

        The keys are those of ``digest.id_keys`` and ``digest.content_keys``.
        """
        same = np.zeros(len(keys), np.bool_)
        for part, asked, rows in _lookup(self._present().parts, keys):
            same[asked] = part.segment.rows.contents[rows] == contents[asked]
        return same

    def vectors(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.bool_], NDArray[np.float16]]:
        """The stored vectors of these ids: which were found (n,), and (n, d), zero where not."""
        view = self._present()
        found = np.zeros(len(keys), np.bool_)
        vectors = np.zeros((len(keys), view.state.spec.dimension), np.float16)
        for part, asked, rows in _lookup(view.parts, keys):
            found[asked] = True
            vectors[asked] = part.segment.rows.vectors[rows]
        return found, vectors

    def stats(self) -> ReaderStats:
        """The present view in numbers."""
        view = self._present()
        indexes = [part.index_entry for part in view.parts if part.index_entry]
        return ReaderStats(
            documents=sum(part.liveness.visible_count for part in view.parts),
            segments=len(view.parts),
            indexed_documents=sum(
                part.liveness.visible_count for part in view.parts if part.index is not None
            ),
            nbytes=sum(part.entry.nbytes for part in view.parts)
            + sum(entry.nbytes for entry in indexes),
            generation=view.state.generation,
            quarantined=view.faults,
        )

    # -- views ----------------------------------------------------------------------------------

    def _release(self, old: _View | None, new: _View) -> None:
        """Give back, in another thread, what only ``old`` had."""
        kept = {part.entry.number for part in new.parts}
        for part in old.parts if old else ():
            if part.entry.number not in kept:
                self._releases.submit(part.segment.release)

    def _present(self) -> _View:
        if self._view is None:
            raise Unavailable("the reader is not open")
        return self._view

    def _next_view(self, old: _View | None, *, missing_is_fault: bool) -> _View:
        state, deltas = self._manifest.deltas(old.state.generation if old else 0)
        known = {part.entry.number: part for part in old.parts} if old else {}
        indexes = {entry.segment: entry for entry in state.indexes}
        died: dict[int, list[RowNumbers]] = {}
        for number, rows in deltas:
            died.setdefault(number, []).append(rows)
        parts: list[_Part] = []
        faults: list[str] = []
        for entry in state.segments:
            part = known.get(entry.number)
            if entry.fault:
                faults.append(entry.file)
                continue
            try:
                part = part or self._open(entry, just_written=old is not None)
            except CorruptSegment:
                faults.append(entry.file)
                continue
            except FileNotFoundError:
                if not missing_is_fault:
                    raise
                faults.append(entry.file)
                continue
            if entry.number in died:
                dead = np.concatenate(died[entry.number])
                part = replace(part, liveness=part.liveness.killed(dead))
            parts.append(self._with_index(part, indexes.get(entry.number), old is not None))
        efforts: dict[str, int] = {}
        for index in (part.index for part in parts if part.index is not None):
            efforts[index.template] = max(efforts.get(index.template, 0), index.effort)
        return _View(state, tuple(parts), tuple(faults), efforts, self._by_signs(state, parts))

    def _by_signs(self, state: State, parts: Sequence[_Part]) -> frozenset[int]:
        """Which of ``parts`` are searched by their signs first: none where the policy is exact."""
        documents = sum(part.liveness.visible_count for part in parts)
        spec = state.spec
        plan = plan_index(documents, spec.dimension, spec.policy, self._thresholds)
        if plan.kind == "exact":
            return frozenset()
        return frozenset(
            place
            for place, part in enumerate(parts)
            if part.index is None and part.segment.signs is not None and part.liveness.visible_count
        )

    def _open(self, entry: SegmentEntry, *, just_written: bool) -> _Part:
        segment = Segment.open(self.directory / entry.file, just_written=just_written)
        return _Part(entry, segment, FlatScan(segment), Liveness.of(segment.rows.tombstones))

    def _with_index(self, part: _Part, entry: IndexEntry | None, just_written: bool) -> _Part:
        """``part`` with its derived index; where that is missing or damaged, the scan serves."""
        if entry == part.index_entry:
            return part
        index: DerivedIndex | None = None
        if entry is not None:
            path = self.directory / entry.file
            try:
                if not just_written and file_crc(path) != entry.crc:
                    raise CorruptData(f"{entry.file} does not match its checksum")
                index = DerivedIndex(path, entry.kind, entry.effort, entry.template)
            except (OSError, CorruptData):
                index = None  # the entry is kept, so that the file is not tried again
        return replace(part, index=index, index_entry=entry)

    def _unit(self, view: _View, queries: NDArray[np.float32]) -> Scores:
        """``queries`` checked and normalised."""
        dimension = view.state.spec.dimension
        if queries.ndim != 2 or queries.shape[1] != dimension:
            raise InvalidVector(f"queries have the shape {queries.shape}, not (q, {dimension})")
        floats = np.ascontiguousarray(queries, np.float32)
        norms = np.linalg.norm(floats, axis=1, keepdims=True)
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise InvalidVector()
        unit: Scores = floats / norms
        return unit


def _hits(
    view: _View,
    scores: NDArray[np.float32],
    owners: RowNumbers,
    rows: RowNumbers,
    k: int,
    threshold: float,
    with_text: bool,
) -> Iterator[Hit]:
    """The best of what all parts found for one query, best first."""
    order = np.argsort(-scores, kind="stable")[:k]
    order = order[(rows[order] >= 0) & (scores[order] >= threshold)]
    for place in order.tolist():
        part, row = view.parts[owners[place]], int(rows[place])
        text, metadata = part.segment.read(row) if with_text else ("", None)
        yield Hit(part.segment.rows.id(row), float(scores[place]), text, metadata)


def _search(view: _View, unit: Scores, k: int) -> list[_Owned]:
    """What all parts find."""
    places = sorted(view.by_signs)
    waiting = [
        (part.segment.signs, part.segment.rows.vectors, part.liveness)
        for part in (view.parts[place] for place in places)
        if part.segment.signs is not None
    ]
    rows = sum(len(signs) for signs, _, _ in waiting)
    found: list[_Owned] = []
    by_signs = view.by_signs
    if signs_candidates(rows, k):
        scores, owners, numbers = search_by_signs(waiting, unit, k)
        found.append((scores, np.array(places)[owners], numbers))
    else:
        by_signs = frozenset()
    lists = NearestLists(view.efforts)
    for place, part in enumerate(view.parts):
        if place not in by_signs:
            found.append(_owned(place, part.search(unit, k, lists)))
    return found


def _owned(place: int, found: Found) -> _Owned:
    scores, rows = found
    return scores, np.full_like(rows, place), rows


def _lookup(
    parts: Iterable[_Part], keys: NDArray[np.uint64]
) -> Iterable[tuple[_Part, RowNumbers, RowNumbers]]:
    """For each part that holds some of ``keys`` visibly: which of them, and their rows."""
    for part in parts:
        rows = part.segment.find(keys, part.liveness.visible)
        asked = np.flatnonzero(rows >= 0)
        if len(asked):
            yield part, asked, rows[asked]
