"""The writer of one partition: shards in, segments out, each step safe against a crash.

A call of ``apply`` writes ONE segment for all its shards and makes it true with ONE commit of the
manifest, which also remembers the shards and the rows that died. Files that no manifest names are
removed when the partition is opened. One writer per partition: the fencing token is compared
inside every commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vecfleet.common.errors import (
    CorruptSegment,
    InvalidVector,
    SpaceMismatch,
    Unavailable,
    VecfleetError,
)
from vecfleet.worker.digest import shard_key
from vecfleet.worker.durable import CrashPoint, no_crash
from vecfleet.worker.liveness import Liveness, losers_within
from vecfleet.worker.manifest import FILE_NAME, Manifest, is_undone
from vecfleet.worker.partition_state import Change, PartitionSpec, SegmentEntry, State
from vecfleet.worker.rows import RowNumbers
from vecfleet.worker.segment import Segment, joined, write_segment
from vecfleet.worker.shard import Shard

QUARANTINE = "quarantine"


@dataclass(frozen=True, slots=True)
class ApplyOutcome:
    """What became of one shard; in every case the shard needs no further delivery."""

    shard_id: str
    status: Literal["applied", "duplicate", "rejected"]
    rows: int = 0
    error: VecfleetError | None = None  # why it was rejected


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


@dataclass(slots=True)
class OpenSegment:
    """A segment with its entry and its living rows."""

    entry: SegmentEntry
    segment: Segment
    liveness: Liveness


class PartitionWriter:
    """The one writer of a partition. Its methods may be called from any thread, one at a time."""

    def __init__(self, directory: Path, manifest: Manifest, token: int, crash: CrashPoint) -> None:
        """Use ``open``."""
        self.directory = directory
        self._manifest = manifest
        self._token = token
        self._crash = crash
        self._lock = RLock()
        self._segments: dict[int, OpenSegment] = {}
        self._orphans: list[Path] = []  # files whose commit failed
        self._next_number = 0
        self._state = manifest.state()

    @classmethod
    def open(
        cls,
        directory: Path,
        spec: PartitionSpec,
        fence_token: int,
        *,
        crash: CrashPoint = no_crash,
    ) -> PartitionWriter:
        """Open the partition in ``directory``, creating it where there is none.

        ``fence_token`` must grow with each new holder of the partition's lease. A damaged segment
        is moved to ``quarantine/`` and named in ``stats()``; its documents are missing until they
        are sent again. Raises ``CorruptManifest``, ``SpaceMismatch``, ``StaleWriter``,
        ``Unavailable``.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"{directory} cannot be made: {error.strerror}") from error
        manifest = Manifest.open(directory, spec, fence_token)
        try:
            writer = cls(directory, manifest, fence_token, crash)
            writer._load()
        except BaseException:
            manifest.close()
            raise
        return writer

    @property
    def state(self) -> State:
        """The manifest as of the last commit."""
        return self._state

    def close(self) -> None:
        """Release the files."""
        with self._lock:
            self._segments.clear()
            self._manifest.close()

    def apply(self, shards: Sequence[Shard]) -> list[ApplyOutcome]:
        """Add all ``shards`` durably, in one step; returns one outcome for each, in order.

        A shard that was applied before, or that is twice in the call, is a ``duplicate``; one of
        another space or dimension is ``rejected``, the others are applied. Of all rows of one id
        the highest version lives; of equal versions the later one. Raises ``Unavailable`` (full
        disk: nothing has changed, the same call can be made again) and ``StaleWriter`` (stop).
        """
        with self._lock:
            keys = [shard_key(shard.shard_id) for shard in shards]
            seen = self._manifest.applied(keys)
            outcomes: list[ApplyOutcome] = []
            fresh: list[Shard] = []
            fresh_keys: list[bytes] = []
            for shard, key in zip(shards, keys, strict=True):
                if key in seen:
                    outcomes.append(ApplyOutcome(shard.shard_id, "duplicate"))
                elif fault := self._fault(shard):
                    outcomes.append(ApplyOutcome(shard.shard_id, "rejected", error=fault))
                else:
                    seen.add(key)
                    fresh.append(shard)
                    fresh_keys.append(key)
                    outcomes.append(ApplyOutcome(shard.shard_id, "applied", len(shard)))
            if fresh:
                self._append(fresh, fresh_keys)
            return outcomes

    def stats(self) -> PartitionStats:
        """The partition in numbers."""
        with self._lock:
            parts = list(self._segments.values())
            indexed = {index.segment for index in self._state.indexes}
            rows = sum(len(part.segment) for part in parts)
            documents = sum(part.liveness.visible_count for part in parts)
            dead = sum(part.liveness.dead_count for part in parts)
            return PartitionStats(
                documents=documents,
                tombstones=rows - dead - documents,
                dead_rows=dead,
                segments=len(parts),
                indexed_documents=sum(
                    part.liveness.visible_count for part in parts if part.entry.number in indexed
                ),
                nbytes=sum(part.entry.nbytes for part in parts)
                + sum(index.nbytes for index in self._state.indexes),
                generation=self._state.generation,
                watermark=self._state.watermark,
                quarantined=tuple(entry.file for entry in self._state.segments if entry.fault),
            )

    def _fault(self, shard: Shard) -> VecfleetError | None:
        spec = self._state.spec
        if shard.space != spec.space:
            return SpaceMismatch(f"the shard's space is {shard.space}, not {spec.space}")
        if shard.dimension != spec.dimension:
            return InvalidVector(
                f"the shard's vectors have {shard.dimension} dimensions, not {spec.dimension}"
            )
        return None

    def _append(self, shards: Sequence[Shard], shard_keys: Sequence[bytes]) -> None:
        """Write one segment of all shards' rows, decide who dies, commit."""
        parts = [shard.rows for shard in shards]
        number = max(self._next_number, self._state.next_number)
        path = self.directory / f"seg-{number:08d}-{self._token:x}.seg"
        info = write_segment(path, self._state.spec.dimension, joined(parts), self._crash)
        try:
            segment = Segment.open(path, just_written=True)
            liveness = Liveness.of(segment.rows.tombstones)
            deaths = self._deaths(segment, number)
            entry = SegmentEntry(
                number=number,
                sequence=number,
                file=info.file,
                rows=info.rows,
                nbytes=info.nbytes,
                generation=self._state.generation + 1,
            )
            change = Change(add_segments=[entry], deaths=deaths, shard_keys=shard_keys)
            self._commit(change)
        except VecfleetError as error:
            # After an I/O error a commit may still turn out to be true when the log is read again,
            # so its file is kept until the next commit has settled the question.
            self._orphans.append(path)
            self._next_number = number + 1
            if is_undone(error):
                self._remove_orphans()
            raise
        self._segments[number] = OpenSegment(entry, segment, liveness)
        for victim, rows in deaths.items():
            self._segments[victim].liveness.kill(rows)

    def _commit(self, change: Change) -> None:
        self._state = self._manifest.commit(self._token, change, self._crash)
        self._remove_orphans()

    def _remove_orphans(self) -> None:
        for path in self._orphans:
            if path.name not in self._state.files:
                path.unlink(missing_ok=True)
        self._orphans.clear()

    def _deaths(self, segment: Segment, number: int) -> dict[int, RowNumbers]:
        """Who dies, by segment, because of a new segment; its own rows may be among them."""
        rows = segment.rows
        losers = losers_within(rows.keys, rows.versions)
        candidates = segment.order.astype(np.int64)  # by key: neighbours in the sorted keys
        if len(losers):
            candidates = candidates[~np.isin(candidates, losers)]
        own: list[NDArray[np.int64]] = [losers]
        deaths: dict[int, RowNumbers] = {}
        keys = rows.keys[candidates]
        for other, part in self._segments.items():
            found = part.segment.find(keys, part.liveness.alive)
            hits = np.flatnonzero(found >= 0)
            if len(hits) == 0:
                continue
            theirs = part.segment.rows.versions[found[hits]]
            older = theirs <= rows.versions[candidates[hits]]
            if older.any():
                deaths[other] = np.sort(found[hits[older]])
            own.append(candidates[hits[~older]])
        mine = np.sort(np.concatenate(own))
        if len(mine):
            deaths[number] = mine
        return deaths

    def _load(self) -> None:
        """Map all segments, put damaged ones into quarantine, remove what nobody names."""
        faults: list[SegmentEntry] = []
        for entry in self._state.segments:
            if entry.fault:
                continue
            try:
                segment = Segment.open(self.directory / entry.file)
            except FileNotFoundError:
                faults.append(_faulty(entry, "the file is missing"))
            except CorruptSegment as error:
                self._quarantine(entry.file)
                faults.append(_faulty(entry, error.message))
            else:
                liveness = Liveness.of(segment.rows.tombstones)
                self._segments[entry.number] = OpenSegment(entry, segment, liveness)
        for number, rows in self._manifest.deltas(0)[1]:
            if number in self._segments:
                self._segments[number].liveness.kill(rows)
        if faults:
            self._commit(Change(replace_segments=faults))
        self._remove_leftovers()

    def _quarantine(self, file: str) -> None:
        target = self.directory / QUARANTINE
        target.mkdir(exist_ok=True)
        (self.directory / file).rename(target / file)

    def _remove_leftovers(self) -> None:
        kept = self._state.files | {FILE_NAME, f"{FILE_NAME}-wal", f"{FILE_NAME}-shm", QUARANTINE}
        for path in self.directory.iterdir():
            if path.name not in kept and path.is_file():
                path.unlink(missing_ok=True)


def _faulty(entry: SegmentEntry, fault: str) -> SegmentEntry:
    return replace(entry, fault=fault)
