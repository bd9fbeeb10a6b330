"""The writer of one partition: shards in, segments out, each step safe against a crash.

A call of ``apply`` writes ONE segment for all its shards and makes it true with ONE commit of the
manifest, which also remembers the shards and the rows that died. Files that no manifest names are
removed when the partition is opened. One writer per partition: the fencing token is compared
inside every commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import RLock

import numpy as np
from numpy.typing import NDArray

from vecfleet.common.errors import (
    CorruptData,
    CorruptSegment,
    InvalidVector,
    SpaceMismatch,
    Unavailable,
    VecfleetError,
)
from vecfleet.worker.commit_mark import MARK_SUFFIX
from vecfleet.worker.digest import shard_key
from vecfleet.worker.durable import CrashPoint, file_crc, no_crash
from vecfleet.worker.index_policy import DEFAULT_THRESHOLDS, Thresholds
from vecfleet.worker.liveness import Liveness
from vecfleet.worker.manifest import FILE_NAME, Manifest
from vecfleet.worker.open_segment import OpenSegment
from vecfleet.worker.partition_report import ApplyOutcome, MaintenanceReport, PartitionStats
from vecfleet.worker.partition_state import (
    Change,
    IndexEntry,
    PartitionSpec,
    SegmentEntry,
    State,
    Template,
)
from vecfleet.worker.segment import Segment, joined, write_segment
from vecfleet.worker.shard import Shard
from vecfleet.worker.sqlite_file import is_undone
from vecfleet.worker.supersession import deaths_by, died_since
from vecfleet.worker.upkeep import Job, Upkeep

__all__ = ["ApplyOutcome", "MaintenanceReport", "PartitionStats", "PartitionWriter"]

QUARANTINE = "quarantine"


class PartitionWriter:
    """The one writer of a partition. Its methods may be called from any thread, one at a time."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        token: int,
        upkeep: Upkeep,
        crash: CrashPoint,
    ) -> None:
        """Use ``open``."""
        self.directory = directory
        self._manifest = manifest
        self._token = token
        self._upkeep = upkeep
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
        thresholds: Thresholds = DEFAULT_THRESHOLDS,
        crash: CrashPoint = no_crash,
        crash_child_at: str = "",
    ) -> PartitionWriter:
        """Open the partition in ``directory``, creating it where there is none.

        ``fence_token`` must grow with each new holder of the partition's lease. A damaged segment
        is moved to ``quarantine/`` and named in ``stats()``; its documents are missing until they
        are sent again. Raises ``CorruptManifest``, ``SpaceMismatch``, ``StaleWriter``,
        ``Unavailable``.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            manifest = Manifest.open(directory, spec, fence_token)
            try:
                upkeep = Upkeep(directory, fence_token, limits=thresholds, crash_at=crash_child_at)
                writer = cls(directory, manifest, fence_token, upkeep, crash)
                writer._load()
            except BaseException:
                manifest.close()
                raise
        except OSError as error:
            raise Unavailable(f"{directory} cannot be opened: {error.strerror}") from error
        return writer

    @property
    def state(self) -> State:
        """The manifest as of the last commit."""
        return self._state

    def close(self) -> None:
        """End the maintenance children and release the files."""
        with self._lock:
            self._upkeep.close()
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

    def applied(self, shard_ids: Sequence[str]) -> set[str]:
        """Those of the shards that the manifest holds, whichever writer committed them.

        Raises ``StaleWriter`` where another may commit more.
        """
        with self._lock, self._manifest.held(self._token):
            by_key = {shard_key(shard_id): shard_id for shard_id in shard_ids}
            return {by_key[key] for key in self._manifest.applied(list(by_key))}

    def maintain(
        self,
        *,
        watermark: int | None = None,
        queries: NDArray[np.float32] | None = None,
        threads: int = 1,
    ) -> MaintenanceReport:
        """Collect what the maintenance children have done, commit it, start what is due.

        Never waits for a child; call it every second or so, and after each ``apply``. No version
        below ``watermark`` can still arrive: tombstones below it may be dropped. ``queries``
        (q, d), real ones where the caller has some, measure the recall of new indexes; ``threads``
        is what a build may use. Raises ``Unavailable`` and ``StaleWriter`` as ``apply`` does.
        """
        with self._lock:
            if watermark is not None and watermark > self._state.watermark:
                self._commit(Change(watermark=watermark))
            committed: list[str] = []
            failed: list[str] = []
            for job in self._upkeep.collect():
                fault = self._finish(job)
                if fault is None:
                    committed.append(job.file)
                else:
                    failed.append(f"{job.file}: {fault}")
            if (committed or failed) and not self._upkeep.jobs:
                self._remove_leftovers()  # when all that ended together is committed
            started = self._upkeep.start(
                self._state, self._segments, self._reserve, threads=threads, queries=queries
            )
            names = tuple(job.file for job in started)
            running = len(self._upkeep.jobs)
            return MaintenanceReport(names, tuple(committed), tuple(failed), running)

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
        """``_append_rows``; a file that the next writer has removed is no fault of the shards."""
        try:
            self._append_rows(shards, shard_keys)
        except FileNotFoundError:
            with self._manifest.held(self._token):
                raise

    def _append_rows(self, shards: Sequence[Shard], shard_keys: Sequence[bytes]) -> None:
        """Write one segment of all shards' rows, decide who dies, commit."""
        parts = [shard.rows for shard in shards]
        number = self._reserve()
        path = self.directory / f"seg-{number:08d}-{self._token:x}.seg"
        info = write_segment(path, self._state.spec.dimension, joined(parts), self._crash)
        try:
            segment = Segment.open(path, own=True)
            liveness = Liveness.of(segment.rows.tombstones)
            deaths = deaths_by(segment, number, self._segments)
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
            if is_undone(error):
                self._remove_orphans()
            raise
        self._segments[number] = OpenSegment(entry, segment, liveness)
        self._upkeep.note_deaths(deaths)
        for victim, rows in deaths.items():
            self._segments[victim].liveness.kill(rows)

    def _reserve(self) -> int:
        """A number that no segment has had."""
        number = max(self._next_number, self._state.next_number)
        self._next_number = number + 1
        return number

    def _finish(self, job: Job) -> str | None:
        """Commit what a child has made; returns why not, where it cannot be used."""
        result = job.result
        if result.error is not None and not (job.is_merge and job.rows):
            self._check_inputs(job, result.error["code"])
            return str(result.error["message"])
        change = Change()
        if result.template is not None:
            change.remove_templates = [template.hash for template in self._state.templates]
            change.add_templates = [result.template]
        if result.index is not None and (job.is_merge or job.number in self._segments):
            change.put_indexes = [result.index]
        elif not job.is_merge:
            return "the segment is gone"
        output = self._swap(job, change) if job.is_merge else None
        before = self._state.files
        made = [entry.file for entry in change.add_segments]
        made += [entry.file for entry in change.put_indexes]
        made += [entry.file for entry in change.add_templates]
        try:
            self._commit(change)
        except VecfleetError:
            self._orphans += [self.directory / file for file in made]
            raise
        self._crash("swapped")
        for number in job.inputs:
            del self._segments[number]
        if output is not None:
            self._segments[job.number] = output
        for file in before - self._state.files:
            (self.directory / file).unlink(missing_ok=True)
        return None

    def _swap(self, job: Job, change: Change) -> OpenSegment | None:
        """Fill ``change`` with the replacement of a merge's inputs; returns the output."""
        change.remove_segments = list(job.inputs)
        if not job.rows:
            return None
        entry = SegmentEntry(
            number=job.number,
            sequence=max(self._segments[number].entry.sequence for number in job.inputs),
            file=job.file,
            rows=job.rows,
            nbytes=job.nbytes,
            generation=self._state.generation + 1,
        )
        output = OpenSegment.open(self.directory, entry, just_written=True)
        dead = died_since(output, job.died, self._segments)
        if len(dead):
            change.deaths = {job.number: dead}
            output.liveness.kill(dead)
        change.add_segments = [entry]
        return output

    def _check_inputs(self, job: Job, code: str) -> None:
        """Put the damaged segment that a child stumbled upon into quarantine."""
        if code not in (CorruptSegment.code, CorruptData.code):
            return
        faults: list[SegmentEntry] = []
        for number in job.inputs or (job.number,):
            part = self._segments.get(number)
            if part is None:
                continue
            try:
                part.segment.verify()
            except CorruptSegment as error:
                self._quarantine(part.entry.file)
                faults.append(replace(part.entry, fault=error.message))
                del self._segments[number]
        if faults:
            self._commit(Change(replace_segments=faults))

    def _commit(self, change: Change) -> None:
        self._state = self._manifest.commit(self._token, change, self._crash)
        self._remove_orphans()

    def _remove_orphans(self) -> None:
        for path in self._orphans:
            if path.name not in self._state.files:
                path.unlink(missing_ok=True)
        self._orphans.clear()

    def _load(self) -> None:
        """Map all segments, put damaged ones into quarantine, remove what nobody names."""
        faults: list[SegmentEntry] = []
        for entry in self._state.segments:
            if entry.fault:
                continue
            try:
                part = OpenSegment.open(self.directory, entry, just_written=False)
            except FileNotFoundError:
                faults.append(replace(entry, fault="the file is missing"))
            except CorruptSegment as error:
                self._quarantine(entry.file)
                faults.append(replace(entry, fault=error.message))
            else:
                self._segments[entry.number] = part
        for number, rows in self._manifest.deltas(0)[1]:
            if number in self._segments:
                self._segments[number].liveness.kill(rows)
        change = Change(
            replace_segments=faults,
            remove_indexes=[i.segment for i in self._state.indexes if self._is_damaged(i)],
            remove_templates=[t.hash for t in self._state.templates if self._is_damaged(t)],
        )
        if change != Change():
            self._commit(change)
        self._remove_leftovers()

    def _is_damaged(self, derived: IndexEntry | Template) -> bool:
        """Whether a derived file has to be built again."""
        path = self.directory / derived.file
        return not path.exists() or file_crc(path) != derived.crc

    def _quarantine(self, file: str) -> None:
        target = self.directory / QUARANTINE
        target.mkdir(exist_ok=True)
        (self.directory / file).rename(target / file)

    def _remove_leftovers(self) -> None:
        """Remove files that the manifest does not name; never those of a writer after us."""
        with self._manifest.held(self._token):
            self._remove_unnamed()

    def _remove_unnamed(self) -> None:
        kept = self._state.files | {path.name for path in self._orphans}
        kept |= {FILE_NAME, *(f"{FILE_NAME}-{end}" for end in ("wal", "shm", "journal"))}
        kept.add(Path(FILE_NAME).with_suffix(MARK_SUFFIX).name)
        for path in self.directory.iterdir():
            if path.name not in kept and path.is_file():
                path.unlink(missing_ok=True)
