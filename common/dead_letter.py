"""The dead letter: what could not be done, with its text and the reason; to look at and try again.

It is RQ's failed registry of each queue. An entry is one document on which the model failed or that
killed its worker, or a whole job: a block that broke the contract, or one that cannot be merged.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import redis.asyncio

from vecfleet.common import keys
from vecfleet.common.admission import Admission
from vecfleet.common.dead_entry import (
    FIELDS,
    DeadEntry,
    documents_of,
    edited,
    entry_of,
    text_keys,
)
from vecfleet.common.dead_walk import MAX_PAGE, DeadFilter, DeadWalk, cursor_of
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
    VecfleetError,
)
from vecfleet.common.redis_client import read_lua, translated

_SHOWN_BYTES = 512 << 10  # the data of larger entries is not read for a list
_PAGE_BYTES = 4 << 20  # nor more than this for one page
_MAX_ID_CHARS = 256
_CATALOGUE_S = 1.0
_CANCELLED = -1
_FULL = {
    -2: "the queue that the entry goes back to is full; try again later",
    -3: "the queues of all tenants of this entry's model are full; try again later",
    -4: "too many bytes of vectors wait to be merged into the entry's collection; try again later",
}


@dataclass(frozen=True, slots=True)
class DeadPage:
    """Entries, the newest first, and where the next ones begin; empty: there are no more."""

    entries: tuple[DeadEntry, ...]
    cursor: str = ""


@dataclass(frozen=True, slots=True)
class DeadSweep:
    """What was done to a page of entries; ``cursor`` as a page has it, for the next ones."""

    done: tuple[str, ...]
    failed: dict[str, VecfleetError]  # by entry
    cursor: str = ""


class DeadLetter:
    """Look at entries, try them again, drop them."""

    def __init__(self, client: redis.asyncio.Redis, admission: Admission | None = None) -> None:
        """``admission``: a retry waits in a queue like any job, within the same limits."""
        self._redis = client
        self._admission = admission or Admission()
        self._walk = DeadWalk(client)
        self._directory = Directory(client)
        self._uids: dict[str, tuple[float, frozenset[str] | None]] = {}
        self._script = client.register_script(read_lua(Path(__file__).parent, "dead_letter"))

    async def page(
        self,
        wanted: DeadFilter | None = None,
        *,
        cursor: str = "",
        limit: int = 50,
        texts: bool = True,
    ) -> DeadPage:
        """At most ``limit`` entries from ``cursor`` on, the newest first; without ``texts``, bare.

        A page may hold fewer, or none, and still have a cursor. Entries of more than 512 KiB have
        no texts in it, nor those that come after 4 MiB of others'. Raises ``InvalidInput``.
        """
        with translated():
            found, cursor = await self._walk.walk(wanted or DeadFilter(), cursor, limit)
            entries = [entry for _, entry in found]
            return DeadPage(tuple(await self._with_texts(entries) if texts else entries), cursor)

    async def each(
        self,
        what: Literal["retry", "drop"],
        wanted: DeadFilter,
        *,
        cursor: str = "",
        limit: int = MAX_PAGE,
    ) -> DeadSweep:
        """Retry or drop what a page holds; where the queue is full it ends early.

        Raises what is in the way of the first one: ``QueueFull`` or ``Unavailable``.
        """
        with translated():
            found, after = await self._walk.walk(wanted, cursor, limit)
        done: list[str] = []
        failed: dict[str, VecfleetError] = {}
        last = cursor
        for place, entry in found:
            try:
                await (self.retry if what == "retry" else self.drop)(entry.id, tenant=entry.tenant)
                done.append(entry.id)
            except (QueueFull, Unavailable):
                if not done and not failed:
                    raise
                return DeadSweep(tuple(done), failed, last)
            except VecfleetError as error:
                failed[entry.id] = error
            last = cursor_of(place)
        return DeadSweep(tuple(done), failed, after)

    async def get(self, entry_id: str, tenant: str | None = None) -> DeadEntry:
        """One entry, with all its texts; raises ``UnknownEntry``."""
        with translated():
            return await self._with_documents(await self._find(entry_id, tenant))

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
            if attempts:
                await self._forget_poison(entry)
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

    async def _forget_poison(self, entry: DeadEntry) -> None:
        """What is tried again on purpose is not refused for what is remembered of it."""
        raw = await self._redis.hget(keys.job(entry.id), "data")
        pool = keys.QueueName.parse(entry.queue).pool
        digests = text_keys(cast(bytes, raw or b""))
        if digests:
            await self._redis.zrem(keys.poison(pool), *(f"condemned:{one}" for one in digests))

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

    async def _find(self, entry_id: str, tenant: str | None) -> DeadEntry:
        if 0 < len(entry_id) <= _MAX_ID_CHARS:
            row: Any = await self._redis.hmget(keys.job(entry_id), *FIELDS)
            entry = entry_of(entry_id, row)
            if entry is not None and tenant in (None, entry.tenant):
                score = await self._redis.zscore(keys.dead(entry.queue), entry_id)
                if score is not None:
                    return entry
        raise UnknownEntry(f"the dead letter holds nothing called {entry_id[:_MAX_ID_CHARS]}")

    async def _with_documents(self, entry: DeadEntry) -> DeadEntry:
        raw = await self._redis.hget(keys.job(entry.id), "data")
        return replace(entry, documents=documents_of(cast(bytes, raw or b"")))

    async def _with_texts(self, entries: Sequence[DeadEntry]) -> list[DeadEntry]:
        """The entries with what of their texts a page has room for."""
        pipe = self._redis.pipeline(transaction=False)
        for entry in entries:
            pipe.hstrlen(keys.job(entry.id), "data")
        room = _PAGE_BYTES
        shown: set[str] = set()
        for entry, size in zip(entries, await pipe.execute(), strict=True):
            if int(size) <= min(room, _SHOWN_BYTES):
                room -= int(size)
                shown.add(entry.id)
                pipe.hget(keys.job(entry.id), "data")
        data = iter(await pipe.execute())
        return [
            replace(entry, documents=documents_of(next(data) or b""))
            if entry.id in shown
            else entry
            for entry in entries
        ]
