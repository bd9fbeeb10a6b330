"""Upkeep of a partition: what to compact and index next, and the children that do it.

Three children at most: one merges the small segments that ingestion leaves, one all others, one
builds indexes, so that nothing long holds up the merges that searches need. A merge of segments
that have indexes keeps them serving until the output has its own; then both are committed together.
Rows that die in the inputs meanwhile are noted here and die in the output at the swap.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vecfleet.worker.compaction import Weight, choose, kept_rows
from vecfleet.worker.index_policy import (
    DEFAULT_THRESHOLDS,
    IndexPlan,
    IndexRequest,
    Thresholds,
    is_large,
    must_retrain,
    plan_index,
)
from vecfleet.worker.maintenance import Result, Task
from vecfleet.worker.maintenance_child import MaintenanceChild
from vecfleet.worker.open_segment import OpenSegment
from vecfleet.worker.partition_state import State, Template
from vecfleet.worker.rows import RowNumbers

MERGE_NICE = {True: 0, False: 2}  # of small and other merges, beyond the writer's own
RETRY_AFTER_S = 30.0
IDLE_S = 30.0  # then a child ends, which costs less to start than to keep


@dataclass(slots=True)
class Job:
    """A merge, with or without an index, or the index of a segment that is there."""

    number: int  # of the segment that is made or indexed
    file: str
    inputs: tuple[int, ...]  # empty for an index alone
    was_indexed: bool = False  # most of its inputs' rows: the output is not served without
    died: list[tuple[int, RowNumbers]] = field(default_factory=list)
    rows: int = 0
    nbytes: int = 0
    result: Result = field(default_factory=Result)

    @property
    def is_merge(self) -> bool:
        """Whether segments are replaced."""
        return bool(self.inputs)


class Upkeep:
    """Decides, starts and collects; the writer commits."""

    def __init__(
        self,
        directory: Path,
        token: int,
        *,
        limits: Thresholds = DEFAULT_THRESHOLDS,
        crash_at: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``crash_at`` names a step at which a child kills itself, for tests."""
        self._directory = directory
        self._token = token
        self._limits = limits
        self._crash_at = crash_at
        self._clock = clock
        self._mergers = {small: MaintenanceChild(nice) for small, nice in MERGE_NICE.items()}
        # Until an index is there, signs serve (first_pass.py).
        self._indexer = MaintenanceChild(None)
        self._merging: dict[bool, Job] = {}  # by whether it is a merge of small segments
        self._indexing: Job | None = None
        self._awaiting_index: list[Job] = []  # merges that are written
        self._not_before_s = {"merge": 0.0, "index": 0.0}
        self._threads = 1
        self._queries = ""
        self._dimension = 0
        self._indexes = False  # whether the plan wants any

    @property
    def jobs(self) -> list[Job]:
        """All that is under way."""
        indexing = [self._indexing] if self._indexing else []
        return [*self._merging.values(), *self._awaiting_index, *indexing]

    @property
    def _children(self) -> list[MaintenanceChild]:
        return [*self._mergers.values(), self._indexer]

    def close(self) -> None:
        """End the children; what they were doing is dropped."""
        for child in self._children:
            child.close()
        self._merging = {}
        self._indexing = None
        self._awaiting_index = []

    def note_deaths(self, deaths: Mapping[int, RowNumbers]) -> None:
        """Remember rows that died in segments that are being merged."""
        for job in self.jobs:
            job.died.extend((n, rows) for n, rows in deaths.items() if n in job.inputs)

    def collect(self) -> list[Job]:
        """Jobs that have ended, well or with ``result.error``; the writer commits them."""
        ended: list[Job] = []
        for small, child in self._mergers.items():
            if small not in self._merging or (result := child.poll()) is None:
                continue
            job = self._merging.pop(small)
            job.result, job.rows, job.nbytes = result, result.rows, result.nbytes
            large = is_large(job.rows, self._dimension, self._limits)
            if result.error is None and large and job.was_indexed and self._indexes:
                self._awaiting_index.append(job)
            else:
                ended.append(job)
        for child in self._children:
            child.rest(IDLE_S)
        if self._indexing is not None and (result := self._indexer.poll()) is not None:
            job, self._indexing = self._indexing, None
            job.result = result
            ended.append(job)
        for job in ended:
            if job.result.error is not None:
                kind = "index" if job.rows or not job.is_merge else "merge"
                self._not_before_s[kind] = self._clock() + RETRY_AFTER_S
        return ended

    def start(
        self,
        state: State,
        segments: Mapping[int, OpenSegment],
        next_number: Callable[[], int],
        *,
        threads: int = 1,
        queries: NDArray[np.float32] | None = None,
    ) -> list[Job]:
        """Start what is due and can be started; returns the jobs that were."""
        self._threads = threads
        self._queries = (
            "" if queries is None else base64.b64encode(queries.astype("<f2").tobytes()).decode()
        )
        self._dimension = state.spec.dimension
        documents = sum(part.liveness.visible_count for part in segments.values())
        plan = plan_index(documents, self._dimension, state.spec.policy, self._limits)
        self._indexes = plan.kind != "exact"
        started: list[Job] = []
        for small in MERGE_NICE:
            if small not in self._merging and self._due("merge"):
                self._start_merge(state, segments, next_number, started, small=small)
        if self._indexing is None and self._indexes and self._due("index"):
            self._start_index(state, segments, plan, documents, started)
        return started

    def _due(self, kind: str) -> bool:
        return self._clock() >= self._not_before_s[kind]

    def _busy(self) -> set[int]:
        return {number for job in self.jobs for number in (*job.inputs, job.number)}

    def _start_merge(
        self,
        state: State,
        segments: Mapping[int, OpenSegment],
        next_number: Callable[[], int],
        started: list[Job],
        *,
        small: bool,
    ) -> None:
        busy = self._busy()
        weights = [
            Weight(number, part.entry.sequence, len(part.segment), self._kept(part, state))
            for number, part in segments.items()
            if number not in busy
        ]
        inputs = choose(weights, small=small)
        if not inputs:
            return
        number = next_number()
        indexed = {entry.segment for entry in state.indexes}
        rows = sum(len(segments[n].segment) for n in inputs)
        rows_indexed = sum(len(segments[n].segment) for n in inputs if n in indexed)
        job = Job(
            number,
            f"seg-{number:08d}-{self._token:x}.seg",
            tuple(inputs),
            was_indexed=2 * rows_indexed > rows,
        )
        task = Task(
            "merge", str(self._directory), number, job.file, job.inputs, crash_at=self._crash_at
        )
        self._mergers[small].submit(task)
        self._merging[small] = job
        started.append(job)

    def _kept(self, part: OpenSegment, state: State) -> int:
        if not part.liveness.tombstone_count:
            return part.living_rows
        return int(np.count_nonzero(kept_rows(part, state.watermark)))

    def _start_index(
        self,
        state: State,
        segments: Mapping[int, OpenSegment],
        plan: IndexPlan,
        documents: int,
        started: list[Job],
    ) -> None:
        template = _template(state, plan)
        job = self._awaiting_index.pop(0) if self._awaiting_index else None
        if job is None:
            part = self._unindexed(state, segments, plan, template)
            if part is None and template and must_retrain(template.trained_rows, documents):
                # Training takes long, so it waits until every large segment has an index of the
                # old template; then all are built again, the largest first.
                template = None
                part = self._unindexed(state, segments, plan, None)
            if part is None:
                return
            job = Job(part.entry.number, part.entry.file, ())
        request = IndexRequest(
            file=f"idx-{job.number:08d}-{self._token:x}-{secrets.token_hex(4)}.faiss",
            kind=plan.kind,
            nlist=template.nlist if template else plan.nlist,
            recall_target=state.spec.recall_target,
            template=template.file if template else None,
            trained_rows=documents,
            threads=self._threads,
        )
        task = Task(
            "index",
            str(self._directory),
            job.number,
            job.file,
            job.inputs,
            index=request,
            queries=self._queries,
            crash_at=self._crash_at,
        )
        self._indexer.submit(task)
        self._indexing = job
        if not job.is_merge:
            started.append(job)

    def _unindexed(
        self,
        state: State,
        segments: Mapping[int, OpenSegment],
        plan: IndexPlan,
        template: Template | None,
    ) -> OpenSegment | None:
        """The largest segment that lacks the index it should have."""
        busy = self._busy()
        have = {entry.segment: entry for entry in state.indexes}
        lacking = []
        for number, part in segments.items():
            if number in busy or not is_large(len(part.segment), self._dimension, self._limits):
                continue
            index = have.get(number)
            if index is None:
                lacking.append(part)
                continue
            old = plan.kind == "ivf" and (template is None or index.template != template.hash)
            if old or index.kind != plan.kind:
                lacking.append(part)
        return max(lacking, key=lambda part: len(part.segment), default=None)


def _template(state: State, plan: IndexPlan) -> Template | None:
    """The newest template of the kind that the plan wants."""
    usable = [template for template in state.templates if template.kind == plan.kind]
    return max(usable, key=lambda template: template.trained_rows, default=None)
