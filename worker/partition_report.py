"""What a partition's writer answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vecfleet.common.errors import VecfleetError


@dataclass(frozen=True, slots=True)
class ApplyOutcome:
    """What became of one shard; in every case the shard needs no further delivery."""

    shard_id: str
    status: Literal["applied", "duplicate", "rejected"]
    rows: int = 0
    error: VecfleetError | None = None  # why it was rejected


@dataclass(frozen=True, slots=True)
class MaintenanceReport:
    """What one call of ``maintain`` found and did; each entry names a segment's file."""

    started: tuple[str, ...] = ()
    committed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()  # with the reason; tried again later
    running: int = 0

    @property
    def idle(self) -> bool:
        """Whether there is nothing left to do."""
        return not (self.started or self.committed or self.failed or self.running)


@dataclass(frozen=True, slots=True)
class PartitionStats:
    """A partition in numbers."""

    documents: int  # living, without tombstones
    tombstones: int
    dead_rows: int  # superseded, still in a file
    segments: int
    indexed_documents: int  # in segments that have a derived index
    nbytes: int  # of segments and indexes
    generation: int
    watermark: int
    quarantined: tuple[str, ...] = ()  # files that were found damaged
