"""Which rows of a segment still count.

A row dies when a row of the same id with a higher (version, sequence of its segment) exists; of all
rows of an id exactly one is alive, a document or a tombstone. Deaths are kept in the manifest, so
nobody ever has to compare versions again to know who lives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vecfleet.worker.rows import Mask, RowNumbers


@dataclass(slots=True)
class Liveness:
    """One segment's living rows; one byte a row, and a bit for whoever needs bits."""

    alive: Mask  # (n,) not superseded
    visible: Mask  # (n,) alive and no tombstone
    tombstone_count: int  # dead or alive
    dead_count: int = 0
    visible_count: int = 0
    _bitmap: NDArray[np.uint8] | None = None

    @classmethod
    def of(cls, tombstones: Mask) -> Liveness:
        """All rows alive."""
        n = len(tombstones)
        visible = ~tombstones
        count = int(np.count_nonzero(visible))
        return cls(np.ones(n, np.bool_), visible, n - count, 0, count)

    def kill(self, rows: RowNumbers) -> None:
        """Let ``rows`` die; rows that are dead already do not matter."""
        self.alive[rows] = False
        self.visible[rows] = False
        self.dead_count = len(self.alive) - int(np.count_nonzero(self.alive))
        self.visible_count = int(np.count_nonzero(self.visible))
        self._bitmap = None

    def killed(self, rows: RowNumbers) -> Liveness:
        """A copy in which ``rows`` are dead; this one stays as it is, for those who read it."""
        copy = Liveness(self.alive.copy(), self.visible.copy(), self.tombstone_count)
        copy.kill(rows)
        return copy

    @property
    def all_visible(self) -> bool:
        """Whether no row has to be left out of a search."""
        return self.visible_count == len(self.visible)

    @property
    def bitmap(self) -> NDArray[np.uint8]:
        """The visible rows, one bit each, lowest bit first."""
        if self._bitmap is None:
            self._bitmap = np.packbits(self.visible, bitorder="little")
        return self._bitmap
