"""Rows: the columns that a shard and a segment have in common."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vecfleet.worker.page import NO_LOCATOR, SLOT_BITS

RowNumbers = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Rows:
    """n rows of documents and tombstones, as views of raw bytes; nothing here is copied."""

    vectors: NDArray[np.float16]  # (n, d), normalised; zero for tombstones
    keys: NDArray[np.uint64]  # (n, 2), digest of the id
    contents: NDArray[np.uint64]  # (n,), digest of text and metadata; 0 for tombstones
    versions: NDArray[np.int64]  # (n,)
    tombstones: Mask  # (n,)
    id_offsets: NDArray[np.uint64]  # (n + 1,), into ids
    ids: NDArray[np.uint8]  # UTF-8
    locators: NDArray[np.uint32]  # (n,), NO_LOCATOR for tombstones
    page_offsets: NDArray[np.uint64]  # (pages + 1,), into pages
    page_rows: NDArray[np.uint8]  # (pages,), how many rows were written into each page
    pages: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.versions)

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self.vectors.shape[1])

    @property
    def page_count(self) -> int:
        """How many pages hold the texts."""
        return len(self.page_offsets) - 1

    def id(self, row: int) -> str:
        """The id of one row."""
        start, end = int(self.id_offsets[row]), int(self.id_offsets[row + 1])
        return self.ids[start:end].tobytes().decode(errors="replace")

    def page(self, number: int) -> bytes:
        """The compressed bytes of one page."""
        start, end = int(self.page_offsets[number]), int(self.page_offsets[number + 1])
        return self.pages[start:end].tobytes()


def shifted_locators(locators: NDArray[np.uint32], pages_before: int) -> NDArray[np.uint32]:
    """Locators of rows whose pages come after ``pages_before`` others."""
    if not pages_before:
        return locators
    moved = locators + np.uint32(pages_before << SLOT_BITS)
    moved[locators == NO_LOCATOR] = NO_LOCATOR
    return moved


def gather_ranges(
    data: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """The byte ranges of ``data``, joined; runs of neighbours are copied as one piece."""
    if len(starts) == 0:
        return np.empty(0, np.uint8)
    ends = starts + lengths
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    first = np.concatenate([[0], breaks])
    last = np.concatenate([breaks, [len(starts)]]) - 1
    pieces = [data[a:b] for a, b in zip(starts[first].tolist(), ends[last].tolist(), strict=True)]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
