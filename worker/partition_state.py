"""What the manifest says: the entries of a partition's state, and a change of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from vecfleet.worker.rows import RowNumbers

IndexKind = Literal["exact", "ivf", "hnsw"]


@dataclass(frozen=True, slots=True)
class PartitionSpec:
    """What a partition is for; pinned when it is created."""

    uid: str  # of the collection
    space: str
    dimension: int
    policy: str = "auto"
    recall_target: float = 0.98


@dataclass(frozen=True, slots=True)
class SegmentEntry:
    """One segment. ``sequence`` orders rows of one version; a ``number`` is never used again."""

    number: int
    sequence: int
    file: str
    rows: int
    nbytes: int
    generation: int
    fault: str = ""  # why it was put into quarantine; empty for a good one


@dataclass(frozen=True, slots=True)
class Template:
    """A trained index without vectors."""

    hash: str
    file: str
    kind: IndexKind
    nlist: int
    trained_rows: int  # rows of the partition when it was trained
    crc: int


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """The derived index of one segment; its labels are row numbers."""

    segment: int
    file: str
    kind: IndexKind
    template: str  # hash; empty for HNSW, which is not trained
    effort: int  # nprobe or efSearch that reaches the recall target
    nbytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class State:
    """The manifest at one moment."""

    spec: PartitionSpec
    generation: int
    token: int
    next_number: int
    watermark: int
    segments: tuple[SegmentEntry, ...] = ()  # by sequence
    templates: tuple[Template, ...] = ()
    indexes: tuple[IndexEntry, ...] = ()

    @property
    def files(self) -> set[str]:
        """Every file that belongs to the partition, but the manifest's own."""
        parts = (self.segments, self.templates, self.indexes)
        return {entry.file for entries in parts for entry in entries}


@dataclass(slots=True)
class Change:
    """What one commit does."""

    add_segments: list[SegmentEntry] = field(default_factory=list)
    replace_segments: list[SegmentEntry] = field(default_factory=list)
    remove_segments: list[int] = field(default_factory=list)  # with their deaths and indexes
    deaths: dict[int, RowNumbers] = field(default_factory=dict)  # by segment number
    add_templates: list[Template] = field(default_factory=list)
    remove_templates: list[str] = field(default_factory=list)
    put_indexes: list[IndexEntry] = field(default_factory=list)
    remove_indexes: list[int] = field(default_factory=list)
    shard_keys: Sequence[bytes] = ()
    watermark: int | None = None
