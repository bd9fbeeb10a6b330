"""The dead letter: what could not be done, with its text and the reason; to look at and try again.

It is RQ's failed registry of each queue. An entry is one document on which the model failed or that
killed its worker, or a whole job: a block that broke the contract, or one that cannot be merged.
"""

from __future__ import annotations

import base64
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import redis.asyncio

from vecfleet.common import keys
from vecfleet.common.admission import Admission
from vecfleet.common.dead_entry import FIELDS, DeadEntry, documents_of, edited, entry_of
from vecfleet.common.directory import Directory
from vecfleet.common.errors import (
    Conflict,
    InvalidInput,
    JobCancelled,
    PoisonText,
    QueueFull,
    Unavailable,
    UnknownCollection,
    UnknownEntry,
)
from vecfleet.common.redis_client import read_lua, translated

MAX_PAGE = 100
_MOST_LOOKED_AT = 5000  # entries; a page of a rare kind may be shorter than was asked for
_AT_ONCE = 64
_SHOWN_BYTES = 512 << 10  # the data of larger entries is not read for a list
_MAX_ID_CHARS = 256
_CATALOGUE_S = 1.0
_CANCELLED = -1
_FULL = {
    -2: "the queue that the entry goes back to is full; try again later",
    -3: "the queues of all tenants of this entry's model are full; try again later",
    -4: "too many bytes of vectors wait to be merged into the entry's collection; try again later",
}
_MAX_SCORE = 2**53
_QUEUES = "rq:queue:vf."
_AGO = re.compile(r"(\d{1,9})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


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
        self._directory = Directory(client)
        self._uids: dict[str, tuple[float, frozenset[str] | None]] = {}
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
        ``UnknownEntry``; ``UnknownCollection`` where its collection was deleted, which would throw
        it away; ``Conflict`` when somebody else took it out meanwhile; an ``InvalidInput``
        for a text that is not valid; ``JobCancelled`` when its submission was cancelled; and
        ``QueueFull``.
        """
        if document is not None and text is None:
            raise InvalidInput("document goes with text", field="document")
        with translated():
            entry = await self._find(entry_id, tenant)
            await self._check_collection(entry)
            data, tokens = b"", 0
            if text is not None:
                raw = await self._redis.hget(keys.job(entry_id), "data")
                data, tokens = edited(cast(bytes, raw or b""), text, document)
            # What killed stays a suspect: it runs alone from the beginning.
            attempts = int(entry.code == PoisonText.code and not data)
            most = self._admission
            more = (attempts, most.max_tokens, most.max_bytes, data, tokens, most.max_shared_bytes)
            merges = (most.max_merge_bytes, most.max_unmerged_bytes)
            done = await self._take_out("retry", entry, *more, *merges)
        if done == _CANCELLED:
            raise JobCancelled(f"submission {entry.submission} was cancelled")
        if done in _FULL:
            raise QueueFull(_FULL[done], retry_after_s=5.0)
        return entry

    async def drop(self, entry_id: str, *, tenant: str | None = None) -> DeadEntry:
        """Remove an entry for good. Raises ``UnknownEntry`` and ``Conflict`` as ``retry``."""
        with translated():
            entry = await self._find(entry_id, tenant)
            await self._take_out("drop", entry)
        return entry

    async def _check_collection(self, entry: DeadEntry) -> None:
        """Raise ``UnknownCollection`` where what is tried again would have nowhere to go."""
        if not entry.uid:
            return
        read_at, uids = self._uids.get(entry.tenant, (-math.inf, None))
        is_unknown = uids is not None and entry.uid not in uids  # it may have been made since
        if is_unknown or time.monotonic() > read_at + _CATALOGUE_S:
            uids = await self._read_uids(entry.tenant)
            self._uids = {entry.tenant: (time.monotonic(), uids)}
        if uids is not None and entry.uid not in uids:
            raise UnknownCollection(
                f"the collection of {entry.id} was deleted: it can only be dropped"
            )

    async def _read_uids(self, tenant: str) -> frozenset[str] | None:
        """The tenant's collections; None while nobody knows them."""
        try:
            found = await self._directory.collections(tenant=tenant)
        except Unavailable:
            return None
        return frozenset(collection.uid for collection in found)

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
            pipe.hmget(keys.job(entry_id), *FIELDS)
        rows = await pipe.execute()
        return [entry_of(place[1], row) for place, row in zip(places, rows, strict=True)]

    async def _find(self, entry_id: str, tenant: str | None) -> DeadEntry:
        if 0 < len(entry_id) <= _MAX_ID_CHARS:
            row: Any = await self._redis.hmget(keys.job(entry_id), *FIELDS)
            entry = entry_of(entry_id, row)
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
        return replace(entry, documents=documents_of(cast(bytes, raw or b"")))


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


def _cursor(place: tuple[float, str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode().rstrip("=")


def _parse_cursor(cursor: str) -> tuple[float, str] | None:
    if not cursor:
        return None
    try:
        raw = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        score, entry_id = json.loads(raw)
        # Scores are Unix times; NaN and what else Python would read is no place in a list.
        if isinstance(entry_id, str) and -_MAX_SCORE <= score <= _MAX_SCORE:
            return float(score), entry_id
    except (ValueError, TypeError, RecursionError):
        pass
    raise InvalidInput("cursor is not one that a page came with", field="cursor")
