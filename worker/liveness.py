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
    """One segment's living rows: a byte a row once one has died, and a bit for who needs bits."""

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
        everyone = np.broadcast_to(np.True_, n)  # of any length, without memory; read-only
        hidden = int(np.count_nonzero(tombstones))
        return cls(everyone, ~tombstones if hidden else everyone, hidden, 0, n - hidden)

    def kill(self, rows: RowNumbers) -> None:
        """Let ``rows`` die; rows that are dead already do not matter."""
        if not self.alive.flags.writeable:
            self.alive = self.alive.copy()
        if not self.visible.flags.writeable:
            self.visible = self.visible.copy()
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
