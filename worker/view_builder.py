"""Makes a partition's next view of its last one and of what was committed since."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vecfleet.common.errors import CorruptData, CorruptSegment
from vecfleet.common.rare_log import RareLog
from vecfleet.worker.ann import SHORTAGES, DerivedIndex, FlatScan
from vecfleet.worker.durable import file_crc
from vecfleet.worker.index_policy import Thresholds, plan_index
from vecfleet.worker.index_view import Part, View
from vecfleet.worker.liveness import Liveness
from vecfleet.worker.manifest import Manifest
from vecfleet.worker.partition_state import IndexEntry, SegmentEntry, State
from vecfleet.worker.rows import RowNumbers
from vecfleet.worker.segment import Segment

log = RareLog(logging.getLogger(__name__))


class ViewBuilder:
    """Opens the files of one partition."""

    def __init__(self, directory: Path, thresholds: Thresholds) -> None:
        """``directory`` is the partition's."""
        self._directory = directory
        self._thresholds = thresholds
        self._sound: set[IndexEntry] = set()  # whose checksum is right, and which wait for room

    def next_view(self, manifest: Manifest, old: View | None, *, missing_is_fault: bool) -> View:
        """The view of the manifest's present generation; files that ``old`` has stay open.

        Without ``missing_is_fault`` raises ``FileNotFoundError``: the file may have been compacted
        away since the manifest was read.
        """
        state, deltas = manifest.deltas(old.state.generation if old else 0)
        known = {part.entry.number: part for part in old.parts} if old else {}
        indexes = {entry.segment: entry for entry in state.indexes}
        died: dict[int, list[RowNumbers]] = {}
        for number, rows in deltas:
            died.setdefault(number, []).append(rows)
        parts: list[Part] = []
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
            parts.append(self._with_index(part, indexes.get(entry.number), old))
        efforts: dict[str, int] = {}
        for index in (part.index for part in parts if part.index is not None):
            efforts[index.template] = max(efforts.get(index.template, 0), index.effort)
        return View(state, tuple(parts), tuple(faults), efforts, self._by_signs(state, parts))

    def _by_signs(self, state: State, parts: Sequence[Part]) -> frozenset[int]:
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

    def _open(self, entry: SegmentEntry, *, just_written: bool) -> Part:
        segment = Segment.open(self._directory / entry.file, just_written=just_written)
        return Part(entry, segment, FlatScan(segment), Liveness.of(segment.rows.tombstones))

    def _with_index(self, part: Part, entry: IndexEntry | None, old: View | None) -> Part:
        """``part`` with its derived index; where that is missing or damaged, the scan serves.

        ``part`` as it is where the system has no file left: see ``View.waits_for_files``.
        """
        if entry == part.index_entry:
            return part
        index: DerivedIndex | None = None
        if entry is not None:
            path = self._directory / entry.file
            just_written = old is not None and entry not in old.state.indexes
            try:
                if not just_written and entry not in self._sound:
                    if file_crc(path) != entry.crc:
                        raise CorruptData(f"{entry.file} does not match its checksum")
                    self._sound.add(entry)  # not to be read whole at each try
                index = DerivedIndex(path, entry.kind, entry.effort, entry.template)
            except (OSError, CorruptData) as error:
                if isinstance(error, OSError) and error.errno in SHORTAGES:
                    log.warning("%s waits to be opened: %s", entry.file, error.strerror)
                    return part
                index = None  # the entry is kept, so that the file is not tried again
            self._sound.discard(entry)
        return replace(part, index=index, index_entry=entry)
