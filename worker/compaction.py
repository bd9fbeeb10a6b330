"""Compaction: many segments become one; the dead are left out, the living copied as columns.

Size-tiered: a segment's tier is the power of ``FAN_IN`` that its living rows reach, and a tier
that has ``FAN_IN`` segments becomes one segment of the next. A row is copied about once a tier.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vecfleet.worker.open_segment import OpenSegment
from vecfleet.worker.page import (
    NO_LOCATOR,
    PAGE_ROWS,
    SLOT_BITS,
    PageRow,
    pack_pages,
    read_page,
)
from vecfleet.worker.rows import Mask, RowNumbers, Rows, gather_ranges

FAN_IN = 8
MAX_FAN_IN = 64  # after a jam, so many go at once
BASE_ROWS = 1024
MAX_SEGMENT_ROWS = 1 << 24
SPARSE_FRACTION = 0.5  # a segment with fewer living rows is rewritten alone
SPARSE_MIN_ROWS = 1024
PIECE_ROWS = 8192
SMALL_PAGE_ROWS = PAGE_ROWS // 4
SMALL_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Weight:
    """What the choice needs to know of a segment."""

    number: int
    sequence: int
    rows: int
    kept_rows: int  # that a compaction would keep now

    @property
    def tier(self) -> int:
        """0 up to 8,191 rows, 1 up to 65,535, and so on."""
        return max(0, int(math.log(max(self.kept_rows, 1) / BASE_ROWS, FAN_IN) + 1e-9))


def choose(weights: Iterable[Weight], *, small: bool | None = None) -> list[int]:
    """The segments to make one now, by number, oldest first; empty when all is well.

    The lowest tier that is full goes first: many small segments cost more than a few large ones.
    ``small`` True looks at the lowest tier alone, False at everything else.
    """
    tiers: dict[int, list[Weight]] = {}
    sparse: list[Weight] = []
    for weight in sorted(weights, key=lambda w: w.sequence):
        if small is not None and small is not (weight.tier == 0):
            continue
        tiers.setdefault(weight.tier, []).append(weight)
        wasted = weight.kept_rows < SPARSE_FRACTION * weight.rows
        if wasted and (weight.rows >= SPARSE_MIN_ROWS or not weight.kept_rows):
            sparse.append(weight)
    for tier in sorted(tiers):
        full = tiers[tier][:MAX_FAN_IN]
        while sum(weight.kept_rows for weight in full) > MAX_SEGMENT_ROWS:
            full.pop()
        if len(full) >= FAN_IN:
            return [weight.number for weight in full]
    return [sparse[0].number] if sparse else []


def kept_rows(part: OpenSegment, watermark: int) -> Mask:
    """Rows of a segment that still count: the living, without tombstones below ``watermark``.

    No older version of what such a tombstone hides can still arrive.
    """
    rows = part.segment.rows
    keep: Mask = part.liveness.alive & ~(rows.tombstones & (rows.versions < watermark))
    return keep


def merged(parts: Sequence[OpenSegment], watermark: int) -> dict[str, Iterable[NDArray[Any]]]:
    """The columns of the segment that replaces ``parts``, for ``write_segment``; lazy if large."""
    kept = [np.flatnonzero(kept_rows(part, watermark)) for part in parts]
    rows = [part.segment.rows for part in parts]
    pages = _Pages()
    locators = [pages.take(part, own) for part, own in zip(rows, kept, strict=True)]
    repacked = pages.repack(locators)
    pairs = list(zip(rows, kept, strict=True))
    lengths = np.concatenate(
        [np.diff(part.id_offsets.astype(np.int64))[own] for part, own in pairs]
    )
    return {
        "vectors": _vectors(pairs),
        "keys": [part.keys[own] for part, own in pairs],
        "contents": [part.contents[own] for part, own in pairs],
        "versions": [part.versions[own] for part, own in pairs],
        "tombstones": [part.tombstones[own] for part, own in pairs],
        "id_offsets": [np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint64)],
        "ids": (_ids(part, own) for part, own in pairs),
        "locators": repacked,
        "page_offsets": [pages.offsets()],
        "page_rows": [np.concatenate([np.empty(0, np.uint8), *pages.counts])],
        "pages": pages.pieces,
    }


def _vectors(pairs: Sequence[tuple[Rows, RowNumbers]]) -> Iterator[NDArray[np.float16]]:
    for part, own in pairs:
        for start in range(0, len(own), PIECE_ROWS):
            some = own[start : start + PIECE_ROWS]
            run = some[-1] - some[0] + 1 == len(some)
            yield part.vectors[some[0] : some[-1] + 1] if run else part.vectors[some]


def _ids(part: Rows, own: RowNumbers) -> NDArray[np.uint8]:
    offsets = part.id_offsets.astype(np.int64)
    return gather_ranges(part.ids, offsets[own], offsets[own + 1] - offsets[own])


class _Pages:
    """The pages of the output: most are copied as they are, sparse ones are packed anew."""

    def __init__(self) -> None:
        self.pieces: list[NDArray[np.uint8]] = []
        self.counts: list[NDArray[np.uint8]] = []
        self._lengths: list[NDArray[np.int64]] = []
        self._count = 0
        self._loose: list[tuple[int, RowNumbers, list[PageRow]]] = []  # part, places, rows
        self._parts = 0

    def take(self, part: Rows, own: RowNumbers) -> NDArray[np.uint32]:
        """Copy the pages of one segment; returns the new locators of its rows ``own``.

        Rows of sparse pages wait for ``repack``.
        """
        locators = part.locators[own].copy()
        placed = np.flatnonzero(locators != NO_LOCATOR)
        numbers = (locators[placed] >> SLOT_BITS).astype(np.int64)
        starts = part.page_offsets.astype(np.int64)
        lengths = np.diff(starts)
        used = np.bincount(numbers, minlength=part.page_count)
        small = (part.page_rows < SMALL_PAGE_ROWS) & (lengths < SMALL_PAGE_BYTES)
        whole = (used > 0) & (2 * used >= part.page_rows) & ~small
        copied = np.flatnonzero(whole)
        renumbered = np.full(part.page_count, -1, np.int64)
        renumbered[copied] = np.arange(self._count, self._count + len(copied))
        slots = locators[placed] & np.uint32((1 << SLOT_BITS) - 1)
        moved = renumbered[numbers]
        stays = moved >= 0
        locators[placed[stays]] = (moved[stays].astype(np.uint32) << SLOT_BITS) | slots[stays]
        self._append(
            gather_ranges(part.pages, starts[copied], lengths[copied]),
            lengths[copied],
            part.page_rows[copied],
        )
        self._loosen(part, placed[~stays], numbers[~stays], slots[~stays])
        return locators

    def _loosen(
        self,
        part: Rows,
        places: RowNumbers,
        numbers: NDArray[np.int64],
        slots: NDArray[np.uint32],
    ) -> None:
        """Take the rows at ``places`` of the output out of their pages."""
        order = np.argsort(numbers, kind="stable")
        ordered = numbers[order]
        groups = np.split(order, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)
        for group in groups if len(order) else []:
            content = read_page(part.page(int(numbers[group[0]])))
            chosen = [content[slot] for slot in slots[group].tolist()]
            self._loose.append((self._parts, places[group], chosen))
        self._parts += 1

    def repack(self, locators: list[NDArray[np.uint32]]) -> list[NDArray[np.uint32]]:
        """Pack the rows of all sparse pages together and fill in where they went."""
        pages, places = pack_pages(row for _, _, rows in self._loose for row in rows)
        places = places + np.uint32(self._count << SLOT_BITS)
        position = 0
        for part, own_places, rows in self._loose:
            locators[part][own_places] = places[position : position + len(rows)]
            position += len(rows)
        if pages:
            joined = np.frombuffer(b"".join(pages), np.uint8)
            numbers = (places >> SLOT_BITS).astype(np.int64) - self._count
            counts = np.bincount(numbers, minlength=len(pages)).astype(np.uint8)
            self._append(joined, np.array([len(page) for page in pages], np.int64), counts)
        return locators

    def offsets(self) -> NDArray[np.uint64]:
        """Where each page begins, and the end."""
        lengths = np.concatenate([np.zeros(1, np.int64), *self._lengths])
        return np.cumsum(lengths).astype(np.uint64)

    def _append(
        self, data: NDArray[np.uint8], lengths: NDArray[np.int64], counts: NDArray[np.uint8]
    ) -> None:
        self.pieces.append(data)
        self._lengths.append(lengths)
        self.counts.append(counts)
        self._count += len(lengths)
