"""The search process: answers reads from the segments on disk, whatever the writer does."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
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
    ReplyTooLarge,
    Unavailable,
    UnknownCollection,
    VecfleetError,
)
from vecfleet.common.hashing import CONTENT_KEY_BYTES, ID_KEY_BYTES
from vecfleet.common.limits import MAX_REPLY_BYTES, MAX_TOP_K
from vecfleet.worker.job import Answer, ClaimedJob, Failure, Outcome, Release
from vecfleet.worker.partition_reader import PartitionReader
from vecfleet.worker.search_report import Hit, StoredDocument

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_UID = re.compile(r"[0-9a-f]{32}")
_MAX_QUERIES = 1024
_MAX_IDS = 4096
_ROW_BYTES = 64  # of a document in an answer, beside its id, text and metadata
_ANSWERS_BYTES = 32 << 20  # of answers that are held, and settled, at once


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
        """``vecfleet.search``: queries of one collection share one pass over its vectors.

        What all answers together have no more room for goes back to the queue.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        outcomes: list[Outcome | None] = [None] * len(jobs)
        for place, job in enumerate(jobs):
            try:
                groups.setdefault(_alike(job), []).append(place)
            except VecfleetError as error:
                outcomes[place] = Failure(error)
        room = _Room(_ANSWERS_BYTES)
        for (_, top_k, threshold, exact), places in groups.items():
            members = [jobs[place] for place in places]
            answers = self._search_together(members, top_k, threshold, exact, room)
            for place, outcome in zip(places, answers, strict=True):
                outcomes[place] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    async def get(self, job: ClaimedJob) -> Outcome:
        """``vecfleet.get``: documents by id."""
        ids = _map(job).get("ids")
        if not isinstance(ids, list) or len(ids) > _MAX_IDS:
            raise InvalidInput(f"ids must be a list of at most {_MAX_IDS}", field="ids")

        def work() -> Answer:
            names = [str(document_id) for document_id in ids]
            documents: list[dict[str, Any] | None] = [None] * len(names)
            room = _Room(MAX_REPLY_BYTES)
            for place, entry in self._reader(job).read(names):
                if not room.take(entry):
                    raise ReplyTooLarge(
                        f"the documents have more than {MAX_REPLY_BYTES} bytes; "
                        "ask for fewer at a time",
                        field="ids",
                    )
                documents[place] = _document(entry)
            return Answer({"documents": documents}, room.taken)

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
        """The collection's reader as of its last commit.

        Raises ``UnknownCollection``, and ``Unavailable`` where the system has no more files for it.
        """
        uid = _uid(_map(job))
        try:
            with self._opening:
                return self._refreshed(uid, self._directory(uid))
        except OSError as error:
            log.error("cannot read %s: %s", uid, error)
            raise Unavailable(f"the collection cannot be read now: {error.strerror}") from error

    def _refreshed(self, uid: str, directory: Path) -> PartitionReader:
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
        except (CorruptData, Unavailable, OSError) as error:
            if directory.is_dir():
                raise
            raise UnknownCollection("the collection was deleted", field="collection") from error
        return reader

    def _search_together(
        self, jobs: Sequence[ClaimedJob], top_k: int, threshold: float, exact: bool, room: _Room
    ) -> list[Outcome]:
        if room.left <= 0:
            return [Release() for _ in jobs]
        started = time.perf_counter()
        outcomes: dict[str, Outcome] = {}
        queries: dict[str, NDArray[np.float32]] = {}
        found: list[Iterator[Hit]] = []
        try:
            reader = self._reader(jobs[0])
            for job in jobs:
                try:
                    queries[job.id] = _queries(job, reader.dimension)
                except VecfleetError as error:
                    outcomes[job.id] = Failure(error)
            if queries:
                rows = np.concatenate(list(queries.values()))
                found = reader.search(rows, top_k, threshold, exact=exact)
        except VecfleetError as error:
            return [Failure(error) for _ in jobs]
        at = 0
        for job in jobs:
            if job.id not in queries:
                continue
            hits = found[at : at + len(queries[job.id])]
            at += len(hits)
            outcome = _answer(job, hits, started) if room.left > 0 else Release()
            if isinstance(outcome, Answer):
                room.left -= outcome.size
            outcomes[job.id] = outcome
        return [outcomes[job.id] for job in jobs]


class _Room:
    """How many bytes of documents may still be read."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.left = most

    @property
    def taken(self) -> int:
        """Bytes of those that were."""
        return self._most - self.left

    def take(self, entry: Hit | StoredDocument) -> bool:
        """Whether there was room for one more."""
        self.left -= _ROW_BYTES + len(entry.id) + _bytes_of(entry.text) + len(entry.metadata or b"")
        return self.left >= 0


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _answer(job: ClaimedJob, found: Sequence[Iterator[Hit]], started: float) -> Outcome:
    """The answer to one job, whose hits are read now."""
    room = _Room(MAX_REPLY_BYTES)
    rows: list[list[dict[str, Any]]] = []
    try:
        for hits in found:
            rows.append([])
            for hit in hits:
                if not room.take(hit):
                    raise ReplyTooLarge(
                        f"the hits have more than {MAX_REPLY_BYTES} bytes; lower top_k, or send "
                        "fewer queries at a time",
                        field="top_k",
                    )
                rows[-1].append(_hit(hit))
    except VecfleetError as error:
        return Failure(error)
    search_ms = (time.perf_counter() - started) * 1000
    return Answer({"hits": rows, "queue_ms": job.queue_ms, "search_ms": search_ms}, room.taken)


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


def _document(entry: StoredDocument) -> dict[str, Any]:
    wire: dict[str, Any] = {"id": entry.id, "text": entry.text, "version": entry.version}
    if entry.metadata is not None:
        wire["metadata"] = entry.metadata
    return wire
