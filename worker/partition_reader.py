"""The reader of one partition: search and look-ups over mapped files, while the writer writes.

A reader holds an immutable **view**: the segments of one generation and who of them lives. A
refresh builds the next view from the manifest's deltas and swaps it in; searches that run keep
theirs, and the files they mapped stay readable after compaction has unlinked them. ``refresh`` and
searches may run in different threads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from vecfleet.common.errors import Unavailable
from vecfleet.worker.digest import id_keys
from vecfleet.worker.index_policy import DEFAULT_THRESHOLDS, Thresholds
from vecfleet.worker.index_view import Part, View
from vecfleet.worker.manifest import Manifest
from vecfleet.worker.search_report import Hit, ReaderStats, StoredDocument
from vecfleet.worker.view_builder import ViewBuilder

REFRESH_ATTEMPTS = 10
INDEX_WAIT_S = 5.0  # before an index is tried again: to look at a large one takes a while


class PartitionReader:
    """Read-only access to one partition; never waits for its writer."""

    def __init__(self, directory: Path, manifest: Manifest, thresholds: Thresholds) -> None:
        """Use ``open``."""
        self.directory = directory
        self._builder = ViewBuilder(directory, thresholds)
        self._manifest = manifest
        self._lock = Lock()
        self._releases = ThreadPoolExecutor(1, thread_name_prefix="release")
        self._seen_version = -1
        self._indexes_at: float | None = None  # time.monotonic, when some are tried again
        self._view: View | None = None

    @classmethod
    def open(
        cls, directory: Path, *, thresholds: Thresholds = DEFAULT_THRESHOLDS
    ) -> PartitionReader:
        """Open the partition in ``directory``.

        Raises ``Unavailable`` before a writer has made it, ``CorruptManifest`` naming the file.
        """
        manifest = Manifest.open_to_read(directory)
        try:
            manifest.check()
            reader = cls(directory, manifest, thresholds)
            reader.refresh()
        except BaseException:
            manifest.close()
            raise
        return reader

    def close(self) -> None:
        """Close the manifest; the maps go with the last view."""
        with self._lock:
            self._manifest.close()
        self._releases.shutdown()

    @property
    def dimension(self) -> int:
        """Length of a query's vector."""
        return self._present().state.spec.dimension

    @property
    def space(self) -> str:
        """The space of the vectors."""
        return self._present().state.spec.space

    def refresh(self) -> bool:
        """See every commit made so far; returns whether there was one. Microseconds if not.

        Where the system had no file left for an index, it is tried again in ``INDEX_WAIT_S``.
        """
        with self._lock:
            version = self._manifest.data_version()
            indexes_wait = self._indexes_at is None or time.monotonic() < self._indexes_at
            if version == self._seen_version and indexes_wait:
                return False
            fault: FileNotFoundError | None = None
            for attempt in range(REFRESH_ATTEMPTS):
                try:
                    last = attempt == REFRESH_ATTEMPTS - 1
                    old = self._view
                    view = self._builder.next_view(self._manifest, old, missing_is_fault=last)
                except FileNotFoundError as error:  # compacted since the manifest was read
                    fault = error
                else:
                    self._view = view
                    self._seen_version = version
                    is_short = view.waits_for_files
                    self._indexes_at = time.monotonic() + INDEX_WAIT_S if is_short else None
                    self._release(old, view)
                    return True
            raise Unavailable(f"{self.directory.name} changes too fast to be read") from fault

    def search(
        self,
        queries: NDArray[np.float32],
        top_k: int,
        threshold: float = -1.0,
        *,
        exact: bool = False,
    ) -> list[Iterator[Hit]]:
        """The ``top_k`` nearest documents of each query (q, d), best first.

        Hits below the cosine ``threshold`` are left out. ``exact`` compares every document, which
        is the measure of recall. Texts are read when a hit is asked for, for callers that may not
        want all. Raises ``InvalidVector`` for a wrong dimension, NaN or a zero vector;
        ``CorruptSegment``, also later, when a text cannot be read.
        """
        return self._present().search(queries, top_k, threshold, exact=exact)

    def read(self, ids: Sequence[str]) -> Iterator[tuple[int, StoredDocument]]:
        """The documents of these ids, each with the place of its id, read one by one."""
        if not ids:
            return
        for part, asked, rows in self._present().lookup(id_keys(ids)):
            for place, row in zip(asked.tolist(), rows.tolist(), strict=True):
                yield place, _stored(part, row)

    def documents(self) -> Iterator[StoredDocument]:
        """Every document of the present view, in no order that means anything."""
        for part in self._present().parts:
            for row in np.flatnonzero(part.liveness.visible).tolist():
                yield _stored(part, row)

    def unchanged(
        self, keys: NDArray[np.uint64], contents: NDArray[np.uint64]
    ) -> NDArray[np.bool_]:
        """Whether the index holds a document of this id (n, 2) with this content (n,); as (n,).

        The keys are those of ``digest.id_keys`` and ``digest.content_keys``.
        """
        same = np.zeros(len(keys), np.bool_)
        for part, asked, rows in self._present().lookup(keys):
            same[asked] = part.segment.rows.contents[rows] == contents[asked]
        return same

    def vectors(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.bool_], NDArray[np.float16]]:
        """The stored vectors of these ids: which were found (n,), and (n, d), zero where not."""
        view = self._present()
        found = np.zeros(len(keys), np.bool_)
        vectors = np.zeros((len(keys), view.state.spec.dimension), np.float16)
        for part, asked, rows in view.lookup(keys):
            found[asked] = True
            vectors[asked] = part.segment.rows.vectors[rows]
        return found, vectors

    def stats(self) -> ReaderStats:
        """The present view in numbers."""
        view = self._present()
        indexes = [part.index_entry for part in view.parts if part.index_entry]
        return ReaderStats(
            documents=sum(part.liveness.visible_count for part in view.parts),
            segments=len(view.parts),
            indexed_documents=sum(
                part.liveness.visible_count for part in view.parts if part.index is not None
            ),
            nbytes=sum(part.entry.nbytes for part in view.parts)
            + sum(entry.nbytes for entry in indexes),
            generation=view.state.generation,
            quarantined=view.faults,
        )

    def _release(self, old: View | None, new: View) -> None:
        """Give back, in another thread, what only ``old`` had."""
        kept = {part.entry.number for part in new.parts}
        for part in old.parts if old else ():
            if part.entry.number not in kept:
                self._releases.submit(part.segment.release)

    def _present(self) -> View:
        if self._view is None:
            raise Unavailable("the reader is not open")
        return self._view


def _stored(part: Part, row: int) -> StoredDocument:
    text, metadata = part.segment.read(row)
    rows = part.segment.rows
    return StoredDocument(rows.id(row), text, metadata, int(rows.versions[row]))
