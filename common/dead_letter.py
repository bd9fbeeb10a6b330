"""The dead letter: what could not be done, with its text and the reason; to look at and try again.

It is RQ's failed registry of each queue. An entry is one document on which the model failed or that
killed its worker, or a whole job: a block that broke the contract, or one that cannot be merged.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import redis.asyncio

from vecfleet.common import codec, keys, limits
from vecfleet.common.document import check_text
from vecfleet.common.errors import (
    Conflict,
    InvalidInput,
    JobCancelled,
    JobFailed,
    PoisonText,
    QueueFull,
    UnknownEntry,
    VecfleetError,
)
from vecfleet.common.queue_client import Admission
from vecfleet.common.redis_client import read_lua, translated

MAX_PAGE = 100
_MOST_LOOKED_AT = 5000  # entries; a page of a rare kind may be shorter than was asked for
_AT_ONCE = 64
_SHOWN_BYTES = 512 << 10  # the data of larger entries is not read for a list
_MAX_ID_CHARS = 256
_QUEUES = "rq:queue:vf."
_NO_SUBMISSION = "."  # no submission's name begins so
_MERGE = re.compile(r"vf\.[^.]+\.merge\.([0-9a-f]+)-\d+\.bulk")
_AGO = re.compile(r"(\d{1,9})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_FIELDS = (
    "status",
    "origin",
    "vf_error",
    "vf_died",
    "vf_died_with",
    "vf_attempts",
    "vf_sub",
    "vf_from",
    "vf_merge",
    "vf_docs",
    "vf_version",
)


@dataclass(frozen=True, slots=True)
class DeadDocument:
    """A document of an entry."""

    id: str
    text: str | None  # None in a deletion


@dataclass(frozen=True, slots=True)
class DeadEntry:
    """What sits in the dead letter under one id."""

    id: str
    queue: str
    tenant: str
    task: str  # "embed", "rerank" or "merge": where it failed
    uid: str  # of its collection; empty for what has none
    submission: str
    code: str
    message: str
    attempts: int
    worker: str
    died_ms: int  # by Redis's clock
    version: int  # 0 where the caller gives them
    count: int  # documents
    documents: tuple[DeadDocument, ...] = ()  # empty where its data is no texts, or too large
    died: str = field(default="", repr=False)  # the same as kept: whether it is still this entry

    def to_wire(self, collection: str = "", preview: int | None = None) -> dict[str, Any]:
        """As JSON; ``preview`` cuts texts to so many characters."""
        return {
            "id": self.id,
            "collection": collection,
            "tenant": self.tenant,
            "task": self.task,
            "submission": self.submission,
            "error": {"code": self.code, "message": self.message},
            "attempts": self.attempts,
            "worker": self.worker,
            "died_at": self.died_ms / 1000,
            "version": self.version,
            "count": self.count,
            "documents": [
                {"id": d.id, "text": d.text if d.text is None else d.text[:preview]}
                for d in self.documents
            ],
        }


@dataclass(frozen=True, slots=True)
class DeadPage:
    """Entries, the newest first, and where the next ones begin; empty: there are no more."""

    entries: tuple[DeadEntry, ...]
    cursor: str = ""


@dataclass(frozen=True, slots=True)
class DeadFilter:
    """Which entries; None stands for all."""

    tenant: str | None = None
    uid: str | None = None  # of the collection
    code: str | None = None
    since_ms: int | None = None

    def takes(self, entry: DeadEntry) -> bool:
        """Whether the entry is meant."""
        return (
            (self.uid is None or entry.uid == self.uid)
            and (self.code is None or entry.code == self.code)
            and (self.since_ms is None or entry.died_ms >= self.since_ms)
        )


@dataclass(slots=True)
class _Feed:
    """One queue's entries, newest first."""

    queue: str
    offset: int = 0
    waiting: list[tuple[float, str]] = field(default_factory=list)
    is_over: bool = False


class DeadLetter:
    """Look at entries, try them again, drop them."""

    def __init__(self, client: redis.asyncio.Redis, admission: Admission | None = None) -> None:
        """``admission``: a retry waits in a queue like any job, within the same limits."""
        self._redis = client
        self._admission = admission or Admission()
        self._script = client.register_script(read_lua(Path(__file__).parent, "dead_letter"))

    async def page(
        self, wanted: DeadFilter | None = None, *, cursor: str = "", limit: int = 50
    ) -> DeadPage:
        """At most ``limit`` entries from ``cursor`` on, the newest first.

        A page may hold fewer, or none, and still have a cursor. Raises ``InvalidInput``.
        """
        if not 0 < limit <= MAX_PAGE:
            raise InvalidInput(f"limit must be from 1 to {MAX_PAGE}", field="limit")
        wanted = wanted or DeadFilter()
        last = _parse_cursor(cursor)
        found: list[DeadEntry] = []
        looked_at = 0
        with translated():
            feeds = [_Feed(queue) for queue in await self._queues(wanted.tenant)]
            while looked_at < _MOST_LOOKED_AT:
                batch = await self._next(feeds, last)
                if not batch:
                    return DeadPage(tuple(found))
                for place, entry in zip(batch, await self._read(batch), strict=True):
                    looked_at, last = looked_at + 1, place[:2]
                    if entry is not None and wanted.takes(entry):
                        found.append(await self._with_documents(entry, _SHOWN_BYTES))
                        if len(found) == limit:
                            return DeadPage(tuple(found), _cursor(last))
        return DeadPage(tuple(found), "" if last is None else _cursor(last))

    async def get(self, entry_id: str, tenant: str | None = None) -> DeadEntry:
        """One entry, with all its texts; raises ``UnknownEntry``."""
        with translated():
            return await self._with_documents(await self._find(entry_id, tenant), None)

    async def retry(
        self,
        entry_id: str,
        *,
        tenant: str | None = None,
        text: str | None = None,
        document: str | None = None,
    ) -> DeadEntry:
        """Queue an entry again, with its old version; with ``text`` in place of the one it had.

        ``document`` says whose text, where the entry holds several documents. Raises
        ``UnknownEntry``; ``Conflict`` when somebody else took it out meanwhile; an ``InvalidInput``
        for a text that is not valid; ``JobCancelled`` when its submission was cancelled; and
        ``QueueFull``.
        """
        if document is not None and text is None:
            raise InvalidInput("document goes with text", field="document")
        with translated():
            entry = await self._find(entry_id, tenant)
            data, tokens = b"", 0
            if text is not None:
                raw = await self._redis.hget(keys.job(entry_id), "data")
                data, tokens = _edited(cast(bytes, raw or b""), text, document)
            # What killed stays a suspect: it runs alone from the beginning.
            attempts = int(entry.code == PoisonText.code and not data)
            most = self._admission
            more = (attempts, most.max_tokens, most.max_bytes, data, tokens)
            done = await self._take_out("retry", entry, *more)
        if done == -1:
            raise JobCancelled(f"submission {entry.submission} was cancelled")
        if done == -2:
            raise QueueFull("the queue that the entry goes back to is full", retry_after_s=5.0)
        return entry

    async def drop(self, entry_id: str, *, tenant: str | None = None) -> DeadEntry:
        """Remove an entry for good. Raises ``UnknownEntry`` and ``Conflict`` as ``retry``."""
        with translated():
            entry = await self._find(entry_id, tenant)
            await self._take_out("drop", entry)
        return entry

    async def _take_out(self, what: str, entry: DeadEntry, *more: Any) -> int:
        names = [
            keys.job(entry.id),
            keys.dead(entry.queue),
            keys.queue_list(entry.queue),
            keys.load(entry.queue),
            keys.QUEUES,
            f"rq:results:{entry.id}",
            keys.outstanding(entry.uid),
        ]
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        arguments = [what, entry.id, entry.queue, entry.died, now, *more]
        done = int(await self._script(keys=names, args=arguments))
        if done == 0:
            raise Conflict(f"somebody else has just taken {entry.id} out of the dead letter")
        return done

    async def _queues(self, tenant: str | None) -> list[str]:
        prefix = _QUEUES if tenant is None else f"{_QUEUES}{tenant}."
        names = cast(Any, await self._redis.smembers(keys.QUEUES))
        found = [raw.decode() for raw in names]
        return sorted(n.removeprefix("rq:queue:") for n in found if n.startswith(prefix))

    async def _next(
        self, feeds: Sequence[_Feed], after: tuple[float, str] | None
    ) -> list[tuple[float, str, str]]:
        """The next entries over all queues: score, id, queue."""
        await self._fill(feeds, after)
        batch: list[tuple[float, str, str]] = []
        while len(batch) < _AT_ONCE:
            with_some = [feed for feed in feeds if feed.waiting]
            if not with_some:
                break
            feed = max(with_some, key=lambda feed: feed.waiting[0])
            batch.append((*feed.waiting.pop(0), feed.queue))
            if not feed.waiting and not feed.is_over:
                break  # what comes next may be of this queue
        return batch

    async def _fill(self, feeds: Sequence[_Feed], after: tuple[float, str] | None) -> None:
        while empty := [feed for feed in feeds if not feed.waiting and not feed.is_over]:
            pipe = self._redis.pipeline(transaction=False)
            for feed in empty:
                most = "+inf" if after is None else repr(after[0])
                pipe.zrevrangebyscore(
                    keys.dead(feed.queue), most, "-inf", feed.offset, _AT_ONCE, withscores=True
                )
            for feed, rows in zip(empty, await pipe.execute(), strict=True):
                feed.offset += len(rows)
                feed.is_over = len(rows) < _AT_ONCE
                places = [(score, raw.decode()) for raw, score in rows]
                feed.waiting = [place for place in places if after is None or place < after]

    async def _read(self, places: Sequence[tuple[float, str, str]]) -> list[DeadEntry | None]:
        pipe = self._redis.pipeline(transaction=False)
        for _, entry_id, _ in places:
            pipe.hmget(keys.job(entry_id), *_FIELDS)
        rows = await pipe.execute()
        return [_entry(place[1], row) for place, row in zip(places, rows, strict=True)]

    async def _find(self, entry_id: str, tenant: str | None) -> DeadEntry:
        if 0 < len(entry_id) <= _MAX_ID_CHARS:
            row: Any = await self._redis.hmget(keys.job(entry_id), *_FIELDS)
            entry = _entry(entry_id, row)
            if entry is not None and tenant in (None, entry.tenant):
                score = await self._redis.zscore(keys.dead(entry.queue), entry_id)
                if score is not None:
                    return entry
        raise UnknownEntry(f"the dead letter holds nothing called {entry_id[:_MAX_ID_CHARS]}")

    async def _with_documents(self, entry: DeadEntry, most_bytes: int | None) -> DeadEntry:
        key = keys.job(entry.id)
        if most_bytes is not None:
            size = await self._redis.hstrlen(key, "data")
            if int(size) > most_bytes:
                return entry
        raw = await self._redis.hget(key, "data")
        return replace(entry, documents=_documents(cast(bytes, raw or b"")))


def parse_since(value: str) -> int:
    """A moment in Unix ms: an ISO date or time, seconds since 1970, or ``90m``, ``2h``, ``3d`` ago.

    Raises ``InvalidInput``.
    """
    if match := _AGO.fullmatch(value):
        return int((time.time() - int(match[1]) * _SECONDS[match[2]]) * 1000)
    if value.isascii() and value.isdigit() and len(value) <= 11:
        return int(value) * 1000
    try:
        moment = datetime.fromisoformat(value)
        aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return int(aware.timestamp() * 1000)
    except (ValueError, OverflowError):
        raise InvalidInput(
            "since must be an ISO date or time, seconds since 1970, or 90m, 2h, 3d ago",
            field="since",
        ) from None


def _entry(entry_id: str, row: Sequence[bytes | None]) -> DeadEntry | None:
    """The entry of a job's fields; None where the job is none of ours, or not dead."""
    status, queue, error, died, worker, attempts, sub, late, merge, docs, version = (
        b"" if value is None else value for value in row
    )
    parts = queue.decode(errors="replace").split(".")
    if status != b"failed" or len(parts) != 5 or parts[0] != "vf":
        return None
    code, message = _told(error)
    in_merge = _MERGE.fullmatch(queue.decode()) or _MERGE.fullmatch(merge.decode(errors="replace"))
    return DeadEntry(
        id=entry_id,
        queue=queue.decode(),
        tenant=parts[1],
        task=parts[2],
        uid=in_merge[1] if in_merge else "",
        submission=(sub or late).decode(errors="replace").removeprefix(_NO_SUBMISSION),
        code=code,
        message=message,
        attempts=_whole(attempts),
        worker=worker.decode(errors="replace"),
        died_ms=_whole(died),
        version=_whole(version),
        count=_whole(docs),
        died=died.decode(errors="replace"),
    )


def _told(error: bytes) -> tuple[str, str]:
    """Code and message of the failure; stock tools say nothing that we can read."""
    try:
        wire = codec.loads(error) if error else {}
    except VecfleetError:
        wire = {}
    wire = wire if isinstance(wire, dict) else {}
    return str(wire.get("code", JobFailed.code)), str(wire.get("message", ""))


def _documents(data: bytes) -> tuple[DeadDocument, ...]:
    """The texts of an embed job, the ids of a deletion; nothing of what is neither."""
    try:
        _, (payload,), _ = codec.unpack_call(codec.inflate(data))
    except (VecfleetError, ValueError):
        return ()
    if not isinstance(payload, dict):
        return ()
    ids, texts = payload.get("ids"), payload.get("texts")
    if isinstance(ids, list) and isinstance(texts, list) and len(ids) == len(texts):
        return tuple(DeadDocument(str(i), str(t)) for i, t in zip(ids, texts, strict=True))
    gone = payload.get("delete")
    return tuple(DeadDocument(str(i), None) for i in gone) if isinstance(gone, list) else ()


def _edited(data: bytes, text: str, document: str | None) -> tuple[bytes, int]:
    """The job's data with another text in it, and its estimated tokens."""
    check_text(text)
    ids: Any = None
    try:
        function, (payload,), _ = codec.unpack_call(codec.inflate(data))
        ids, texts = payload["ids"], list(payload["texts"])
    except (VecfleetError, ValueError, TypeError, KeyError):
        pass
    if not isinstance(ids, list) or len(ids) != len(texts):
        raise InvalidInput("this entry holds no texts to replace", field="text")
    if document is None and len(ids) > 1:
        raise InvalidInput(
            f"the entry holds {len(ids)} documents: say with document whose text it is",
            field="document",
        )
    name = ids[0] if document is None else document
    if name not in ids:
        raise InvalidInput("the entry holds no document of this id", field="document")
    texts[ids.index(name)] = text
    size = sum(len(str(one).encode(errors="replace")) for one in texts)
    edited = codec.pack_call(function, {**payload, "texts": texts})
    return edited, limits.estimate_tokens(size, len(texts))


def _cursor(place: tuple[float, str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode().rstrip("=")


def _parse_cursor(cursor: str) -> tuple[float, str] | None:
    if not cursor:
        return None
    try:
        raw = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        score, entry_id = json.loads(raw)
        if isinstance(entry_id, str):
            return float(score), entry_id
    except (ValueError, TypeError):
        pass
    raise InvalidInput("cursor is not one that a page came with", field="cursor")


def _whole(value: bytes) -> int:
    try:
        return int(value or 0)
    except ValueError:
        return 0
