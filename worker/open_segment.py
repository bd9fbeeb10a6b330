"""A segment in use: the map, its entry in the manifest, and who of its rows lives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vecfleet.worker.liveness import Liveness
from vecfleet.worker.partition_state import SegmentEntry
from vecfleet.worker.rows import RowNumbers
from vecfleet.worker.segment import Segment


@dataclass(slots=True)
class OpenSegment:
    """One segment of a partition; its writer changes ``liveness`` in place."""

    entry: SegmentEntry
    segment: Segment
    liveness: Liveness

    @classmethod
    def open(cls, directory: Path, entry: SegmentEntry, *, just_written: bool) -> OpenSegment:
        """Map and check it, all rows alive; raises like ``Segment.open``."""
        segment = Segment.open(directory / entry.file, just_written=just_written)
        return cls(entry, segment, Liveness.of(segment.rows.tombstones))

    @property
    def living_rows(self) -> int:
        """Rows that a compaction would keep."""
        return len(self.segment) - self.liveness.dead_count


def open_all(
    directory: Path, entries: Sequence[SegmentEntry], deaths: Iterable[tuple[int, RowNumbers]]
) -> Mapping[int, OpenSegment]:
    """Some segments by number, with the deaths that the manifest lists."""
    parts = {e.number: OpenSegment.open(directory, e, just_written=False) for e in entries}
    for number, rows in deaths:
        if number in parts:
            parts[number].liveness.kill(rows)
    return parts
