"""The search process: answers reads from the segments on disk, whatever the writer does."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vecfleet.common.errors import (
    CorruptData,
    CorruptPayload,
    InvalidInput,
    InvalidVector,
    Unavailable,
    UnknownCollection,
    VecfleetError,
)
from vecfleet.common.hashing import CONTENT_KEY_BYTES, ID_KEY_BYTES
from vecfleet.common.limits import MAX_TOP_K
from vecfleet.worker.job import Answer, ClaimedJob, Failure, Outcome
from vecfleet.worker.search_index import Hit, PartitionReader

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_UID = re.compile(r"[0-9a-f]{32}")
_MAX_QUERIES = 1024
_MAX_IDS = 4096


class SearchHandler:
    """Opens readers as they are asked for.

    Searches run in the thread that claims them; the other reads in one beside the loop, so that no
    search waits for a producer's comparing.
    """

    def __init__(self, root: Path) -> None:
        """``root`` is the aggregator's index directory."""
        self._root = root
        self._readers: dict[str, PartitionReader] = {}
        self._opening = Lock()  # held while a reader is opened, refreshed or closed
        self._others = ThreadPoolExecutor(1, thread_name_prefix="read")

    def close(self) -> None:
        """Release the files."""
        self._others.shutdown()
        for reader in self._readers.values():
            reader.close()

    def forget_deleted(self) -> None:
        """Release the files of collections that were deleted since they were last asked for."""
        with self._opening:
            gone = [uid for uid in self._readers if not self._directory(uid).is_dir()]
            readers = [self._readers.pop(uid) for uid in gone]
        for reader in readers:
            reader.close()

    def search(self, jobs: Sequence[ClaimedJob]) -> Sequence[Outcome]:
        """``vecfleet.search``: queries of one collection share one pass over its vectors."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        outcomes: list[Outcome | None] = [None] * len(jobs)
        for place, job in enumerate(jobs):
            try:
                groups.setdefault(_alike(job), []).append(place)
            except VecfleetError as error:
                outcomes[place] = Failure(error)
        for (_, top_k, threshold, exact), places in groups.items():
            members = [jobs[place] for place in places]
            answers = self._search_together(members, top_k, threshold, exact)
            for place, outcome in zip(places, answers, strict=True):
                outcomes[place] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    async def get(self, job: ClaimedJob) -> Outcome:
        """``vecfleet.get``: documents by id."""
        ids = _map(job).get("ids")
        if not isinstance(ids, list) or len(ids) > _MAX_IDS:
            raise InvalidInput(f"ids must be a list of at most {_MAX_IDS}", field="ids")

        def work() -> Answer:
            found = self._reader(job).get([str(document_id) for document_id in ids])
            return Answer({"documents": [_document(entry) for entry in found]})

        return await self._in_thread(work)

    async def unchanged(self, job: ClaimedJob) -> Outcome:
        """``vecfleet.unchanged``: which documents stand in the index already."""
        payload = _map(job)
        keys = _column(payload, "id_keys", ID_KEY_BYTES).view("<u8").reshape(-1, 2)
        contents = _column(payload, "content_keys", CONTENT_KEY_BYTES).view("<u8")
        if len(keys) != len(contents):
            raise CorruptPayload("id_keys and content_keys must be of one length")

        def work() -> Answer:
            same = self._reader(job).unchanged(keys, contents)
            return Answer({"unchanged": same.astype(np.uint8).tobytes()})

        return await self._in_thread(work)

    async def stats(self, job: ClaimedJob) -> Outcome:
        """``vecfleet.stats``: the collection in numbers."""

        def work() -> Answer:
            stats = self._reader(job).stats()
            return Answer(
                {
                    "documents": stats.documents,
                    "segments": stats.segments,
                    "bytes": stats.nbytes,
                    "indexed": stats.indexed_documents,
                    "generation": stats.generation,
                    "quarantined": list(stats.quarantined),
                }
            )

        return await self._in_thread(work)

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._others, work)

    def _directory(self, uid: str) -> Path:
        return self._root / uid / "0"

    def _reader(self, job: ClaimedJob) -> PartitionReader:
        """The collection's reader as of its last commit; raises ``UnknownCollection``."""
        uid = _uid(_map(job))
        directory = self._directory(uid)
        with self._opening:
            if not directory.is_dir():
                if gone := self._readers.pop(uid, None):
                    gone.close()
                raise UnknownCollection("the collection was deleted", field="collection")
            reader = self._readers.get(uid)
            try:
                if reader is None:
                    reader = self._readers[uid] = PartitionReader.open(directory)
                else:
                    reader.refresh()
            except (CorruptData, Unavailable) as error:
                if directory.is_dir():
                    raise
                raise UnknownCollection("the collection was deleted", field="collection") from error
            return reader

    def _search_together(
        self, jobs: Sequence[ClaimedJob], top_k: int, threshold: float, exact: bool
    ) -> list[Outcome]:
        started = time.perf_counter()
        outcomes: dict[str, Outcome] = {}
        queries: dict[str, NDArray[np.float32]] = {}
        found: list[list[Hit]] = []
        try:
            reader = self._reader(jobs[0])
            for job in jobs:
                try:
                    queries[job.id] = _queries(job, reader.dimension)
                except VecfleetError as error:
                    outcomes[job.id] = Failure(error)
            if queries:
                rows = np.concatenate(list(queries.values()))
                look = reader.exact if exact else reader.search
                found = look(rows, top_k, threshold)
        except VecfleetError as error:
            return [Failure(error) for _ in jobs]
        search_ms = (time.perf_counter() - started) * 1000
        at = 0
        for job in jobs:
            if job.id in queries:
                count = len(queries[job.id])
                # An empty collection finds nothing, not even an empty list for each query.
                hits = found[at : at + count] or [[] for _ in range(count)]
                at += count
                outcomes[job.id] = Answer(
                    {
                        "hits": [[_hit(entry) for entry in row] for row in hits],
                        "queue_ms": job.queue_ms,
                        "search_ms": search_ms,
                    }
                )
        return [outcomes[job.id] for job in jobs]


def _map(job: ClaimedJob) -> dict[str, Any]:
    if not isinstance(job.payload, dict):
        raise CorruptPayload("a read's payload is a map")
    return job.payload


def _uid(payload: dict[str, Any]) -> str:
    uid = payload.get("uid")
    if not isinstance(uid, str) or not _UID.fullmatch(uid):
        raise InvalidInput("uid must be 32 hex digits", field="uid")
    return uid


def _alike(job: ClaimedJob) -> tuple[str, int, float, bool]:
    """What searches must share to run together."""
    payload = _map(job)
    top_k, threshold = payload.get("top_k"), payload.get("threshold", -1.0)
    if type(top_k) is not int or not 0 < top_k <= MAX_TOP_K:
        raise InvalidInput(f"top_k must be from 1 to {MAX_TOP_K}", field="top_k")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise InvalidInput("threshold must be a number", field="threshold")
    return _uid(payload), top_k, float(threshold), payload.get("exact") is True


def _queries(job: ClaimedJob, dimension: int) -> NDArray[np.float32]:
    """The query vectors of one job, checked; as (q, dimension)."""
    raw = _map(job).get("vectors")
    width = 4 * dimension
    if not isinstance(raw, bytes) or not raw or len(raw) % width:
        size = len(raw) if isinstance(raw, bytes) else 0
        raise InvalidVector(
            f"vectors has {size} bytes; the collection's vectors have {dimension} "
            f"dimensions, {width} bytes each",
            field="vector",
        )
    rows = np.frombuffer(raw, "<f4").reshape(-1, dimension)
    if len(rows) > _MAX_QUERIES:
        raise InvalidInput(f"at most {_MAX_QUERIES} queries in one call", field="vectors")
    norms = np.linalg.norm(rows, axis=1)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise InvalidVector(field="vector")
    return rows


def _column(payload: dict[str, Any], name: str, width: int) -> NDArray[np.uint8]:
    raw = payload.get(name)
    if not isinstance(raw, bytes) or len(raw) % width or len(raw) > _MAX_IDS * width:
        raise CorruptPayload(f"{name} must be at most {_MAX_IDS} keys of {width} bytes")
    return np.frombuffer(raw, np.uint8)


def _hit(hit: Hit) -> dict[str, Any]:
    wire: dict[str, Any] = {"id": hit.id, "score": hit.score, "text": hit.text}
    if hit.metadata is not None:
        wire["metadata"] = hit.metadata
    return wire


def _document(entry: Any) -> dict[str, Any] | None:
    if entry is None:
        return None
    wire = {"id": entry.id, "text": entry.text, "version": entry.version}
    if entry.metadata is not None:
        wire["metadata"] = entry.metadata
    return wire
