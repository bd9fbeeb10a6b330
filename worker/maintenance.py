"""The child process that compacts segments or builds indexes: ``python -m`` this module.

Each task is a line of JSON on stdin, its result a line of JSON on stdout. When stdin closes,
because the parent stopped or died, the child ends at once, whatever it is doing. It writes new
files only; whether they count is for the parent's commit to say.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal

import numpy as np

from vecfleet.common.errors import CorruptData, Unavailable, VecfleetError
from vecfleet.worker.compaction import kept_rows, merged
from vecfleet.worker.durable import CrashPoint
from vecfleet.worker.index_policy import IndexRequest
from vecfleet.worker.manifest import Manifest
from vecfleet.worker.open_segment import OpenSegment, open_all
from vecfleet.worker.partition_state import IndexEntry, SegmentEntry, Template
from vecfleet.worker.segment import Segment, write_segment


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work: make one segment of ``inputs``, or index the segment ``file``.

    For an index, ``inputs`` are what the segment was made of, where that still serves.
    """

    kind: Literal["merge", "index"]
    directory: str
    number: int  # of the segment that is written or indexed
    file: str
    inputs: tuple[int, ...] = ()
    index: IndexRequest | None = None
    queries: str = ""  # (q, d) float16 vectors, base64
    crash_at: str = ""  # tests: SIGKILL itself at this step

    def to_json(self) -> str:
        """The task as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Task:
        """The task that ``to_json`` wrote."""
        wire = json.loads(line)
        index = wire["index"] and IndexRequest(**wire["index"])
        return cls(**{**wire, "inputs": tuple(wire["inputs"]), "index": index})


@dataclass(frozen=True, slots=True)
class Result:
    """What the child made; or why it could not."""

    rows: int = 0
    nbytes: int = 0
    index: IndexEntry | None = None
    template: Template | None = None
    error: dict[str, Any] | None = None  # VecfleetError.to_wire

    def to_json(self) -> str:
        """The result as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Result:
        """The result that ``to_json`` wrote."""
        wire = json.loads(line)
        wire["index"] = wire["index"] and IndexEntry(**wire["index"])
        wire["template"] = wire["template"] and Template(**wire["template"])
        return cls(**wire)


def run(task: Task, crash: CrashPoint) -> Result:
    """Do the task; raises a ``VecfleetError``."""
    directory = Path(task.directory)
    try:
        return (_merge if task.kind == "merge" else _index)(task, directory, crash)
    except OSError as error:
        raise Unavailable(f"maintenance failed: {error}") from error


def _merge(task: Task, directory: Path, crash: CrashPoint) -> Result:
    manifest = Manifest.open_to_read(directory)
    state, deaths = manifest.deltas(0)
    manifest.close()
    wanted = set(task.inputs)
    entries = [entry for entry in state.segments if entry.number in wanted]
    parts = list(open_all(directory, entries, deaths).values())
    crash("merge opened")
    if not any(kept_rows(part, state.watermark).any() for part in parts):
        return Result()
    path = directory / task.file
    columns = merged(parts, state.watermark)
    info = write_segment(path, state.spec.dimension, columns, lambda name: crash(f"merge {name}"))
    Segment.open(path)  # checked once here, so that readers that run need not
    crash("merged")
    return Result(info.rows, info.nbytes)


def _index(task: Task, directory: Path, crash: CrashPoint) -> Result:
    from vecfleet.worker import ann, derivation  # a child that merges does without faiss

    if task.index is None:
        raise CorruptData("a task to index names no index")
    ann.set_threads(task.index.threads)
    manifest = Manifest.open_to_read(directory)
    state, deaths = manifest.deltas(0)
    manifest.close()
    training = task.index.template is None
    wanted = set(task.inputs)
    entries = [e for e in state.segments if not e.fault and (training or e.number in wanted)]
    sources = open_all(directory, entries, deaths)
    indexes = {entry.segment: entry for entry in state.indexes}
    origins = [(sources[n], indexes.get(n)) for n in task.inputs if n in sources]
    entry = SegmentEntry(task.number, 0, task.file, 0, 0, 0)
    part = OpenSegment.open(directory, entry, just_written=False)
    queries = None
    if task.queries:
        raw = np.frombuffer(base64.b64decode(task.queries), "<f2")
        queries = raw.reshape(-1, part.segment.rows.dimension).astype(np.float32)
    crash("index opened")
    derived = derivation.derive(directory, part, sources, task.index, queries, origins, crash)
    return Result(index=derived.index, template=derived.template)


def _crash_point(name: str) -> CrashPoint:
    def crash(reached: str) -> None:
        if reached == name:
            os.kill(os.getpid(), signal.SIGKILL)

    return crash


def _stand_back(nice: str) -> None:
    """Nicer by so much; "None": Linux then lets every other process interrupt this one at once."""
    if nice != "None":
        os.nice(int(nice))
    elif hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(19)


def main() -> None:
    """Do the tasks of stdin, one after the other."""
    _stand_back(sys.argv[1])
    lines: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    Thread(target=read, daemon=True).start()
    while True:
        task = Task.from_json(lines.get())
        try:
            result = run(task, _crash_point(task.crash_at))
        except VecfleetError as error:
            result = Result(error=error.to_wire())
        sys.stdout.write(result.to_json() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
