"""What a reader sees at one moment: the segments of a generation, who of them lives, and searches.

A view never changes; the reader swaps the next one in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vecfleet.common.errors import InvalidVector
from vecfleet.worker.ann import DerivedIndex, FlatScan, Found, NearestLists, nothing_found
from vecfleet.worker.exact_scan import Scores, scan
from vecfleet.worker.first_pass import search_by_signs
from vecfleet.worker.index_policy import signs_candidates
from vecfleet.worker.liveness import Liveness
from vecfleet.worker.partition_state import IndexEntry, SegmentEntry, State
from vecfleet.worker.rows import RowNumbers
from vecfleet.worker.search_report import Hit
from vecfleet.worker.segment import Segment

_Owned = tuple[Scores, RowNumbers, RowNumbers]  # (q, k) scores, places of parts, their rows


@dataclass(frozen=True, slots=True)
class Part:
    """One segment of a view."""

    entry: SegmentEntry
    segment: Segment
    scan: FlatScan
    liveness: Liveness
    index: DerivedIndex | None = None
    index_entry: IndexEntry | None = None

    def search(self, queries: Scores, k: int, lists: NearestLists) -> Found:
        """The ``k`` nearest of this segment, by its index where it has one."""
        if not self.liveness.visible_count:
            return nothing_found(len(queries), k)
        if self.index is not None:
            vectors = self.segment.rows.vectors
            return self.index.search(queries, k, self.liveness, vectors, lists)
        return self.scan.search(queries, k, self.liveness)


@dataclass(frozen=True, slots=True)
class View:
    """One generation of a partition."""

    state: State
    parts: tuple[Part, ...]
    faults: tuple[str, ...]  # files that could not be used
    efforts: Mapping[str, int]  # the highest of each template's indexes
    by_signs: frozenset[int]  # places of parts that wait for an index and carry signs

    @property
    def waits_for_files(self) -> bool:
        """Whether an index could not be opened, for want of files, and is to be tried again."""
        indexes = {entry.segment: entry for entry in self.state.indexes}
        return any(part.index_entry != indexes.get(part.entry.number) for part in self.parts)

    def search(
        self, queries: NDArray[np.float32], top_k: int, threshold: float, *, exact: bool
    ) -> list[Iterator[Hit]]:
        """See ``PartitionReader.search``."""
        unit = self._unit(queries)
        found = self._every(unit, top_k) if exact else self._nearest(unit, top_k)
        if not found:
            return [iter(()) for _ in unit]
        scores, owners, rows = (
            np.concatenate(columns, axis=1) for columns in zip(*found, strict=True)
        )
        return [
            self._hits(scores[query], owners[query], rows[query], top_k, threshold)
            for query in range(len(scores))
        ]

    def lookup(self, keys: NDArray[np.uint64]) -> Iterator[tuple[Part, RowNumbers, RowNumbers]]:
        """For each part that holds some of ``keys`` visibly: which of them, and their rows."""
        for part in self.parts:
            rows = part.segment.find(keys, part.liveness.visible)
            asked = np.flatnonzero(rows >= 0)
            if len(asked):
                yield part, asked, rows[asked]

    def _unit(self, queries: NDArray[np.float32]) -> Scores:
        """``queries`` checked and normalised."""
        dimension = self.state.spec.dimension
        if queries.ndim != 2 or queries.shape[1] != dimension:
            raise InvalidVector(f"queries have the shape {queries.shape}, not (q, {dimension})")
        floats = np.ascontiguousarray(queries, np.float32)
        norms = np.linalg.norm(floats, axis=1, keepdims=True)
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise InvalidVector()
        unit: Scores = floats / norms
        return unit

    def _every(self, unit: Scores, k: int) -> list[_Owned]:
        """What a comparison with every document finds."""
        return [
            _owned(place, scan(part.segment.rows.vectors, unit, k, part.liveness.visible))
            for place, part in enumerate(self.parts)
        ]

    def _nearest(self, unit: Scores, k: int) -> list[_Owned]:
        """What the indexes find, and the signs where there is no index yet."""
        places = sorted(self.by_signs)
        waiting = [
            (part.segment.signs, part.segment.rows.vectors, part.liveness)
            for part in (self.parts[place] for place in places)
            if part.segment.signs is not None
        ]
        rows = sum(len(signs) for signs, _, _ in waiting)
        found: list[_Owned] = []
        by_signs = self.by_signs
        if signs_candidates(rows, k):
            scores, owners, numbers = search_by_signs(waiting, unit, k)
            found.append((scores, np.array(places)[owners], numbers))
        else:
            by_signs = frozenset()
        lists = NearestLists(self.efforts)
        for place, part in enumerate(self.parts):
            if place not in by_signs:
                found.append(_owned(place, part.search(unit, k, lists)))
        return found

    def _hits(
        self,
        scores: NDArray[np.float32],
        owners: RowNumbers,
        rows: RowNumbers,
        k: int,
        threshold: float,
    ) -> Iterator[Hit]:
        """The best of what all parts found for one query, best first."""
        order = np.argsort(-scores, kind="stable")[:k]
        order = order[(rows[order] >= 0) & (scores[order] >= threshold)]
        for place in order.tolist():
            part, row = self.parts[owners[place]], int(rows[place])
            text, metadata = part.segment.read(row)
            yield Hit(part.segment.rows.id(row), float(scores[place]), text, metadata)


def _owned(place: int, found: Found) -> _Owned:
    scores, rows = found
    return scores, np.full_like(rows, place), rows
