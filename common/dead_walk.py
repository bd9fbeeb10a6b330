"""The way through the dead letter, the newest entry first, over the queues of one tenant or all."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import redis.asyncio

from vecfleet.common import keys
from vecfleet.common.dead_entry import FIELDS, DeadEntry, entry_of
from vecfleet.common.errors import InvalidInput

MAX_PAGE = 100
_MOST_LOOKED_AT = 5000  # entries; a page of a rare kind may be shorter than was asked for
_MAX_SCORE = 2**53
_AT_ONCE = 64
Place = tuple[float, str]  # in the order of the dead letter: its score and its id
_QUEUES = "rq:queue:vf."
_AGO = re.compile(r"(\d{1,9})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


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
    waiting: list[Place] = field(default_factory=list)
    is_over: bool = False


class DeadWalk:
    """Finds entries, without their texts."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._redis = client

    async def walk(
        self, wanted: DeadFilter, cursor: str, limit: int
    ) -> tuple[list[tuple[Place, DeadEntry]], str]:
        """Entries with their places, without their texts, and the cursor behind them."""
        if not 0 < limit <= MAX_PAGE:
            raise InvalidInput(f"limit must be from 1 to {MAX_PAGE}", field="limit")
        last = _parse_cursor(cursor)
        begin = last  # of all queues; each goes on from there by what it has read
        found: list[tuple[Place, DeadEntry]] = []
        looked_at = 0
        feeds = [_Feed(queue) for queue in await self._queues(wanted.tenant)]
        while looked_at < _MOST_LOOKED_AT:
            batch = await self._next(feeds, begin)
            if not batch:
                return found, ""
            for place, entry in zip(batch, await self._read(batch), strict=True):
                looked_at, last = looked_at + 1, place[:2]
                if entry is not None and wanted.takes(entry):
                    found.append((last, entry))
                    if len(found) == limit:
                        return found, cursor_of(last)
        return found, "" if last is None else cursor_of(last)

    async def _queues(self, tenant: str | None) -> list[str]:
        prefix = _QUEUES if tenant is None else f"{_QUEUES}{tenant}."
        names = cast(Any, await self._redis.smembers(keys.QUEUES))
        found = [raw.decode(errors="replace") for raw in names]
        return sorted(n.removeprefix("rq:queue:") for n in found if n.startswith(prefix))

    async def _next(
        self, feeds: Sequence[_Feed], after: Place | None
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

    async def _fill(self, feeds: Sequence[_Feed], after: Place | None) -> None:
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
                places = [(score, raw.decode(errors="replace")) for raw, score in rows]
                feed.waiting = [place for place in places if after is None or place < after]

    async def _read(self, places: Sequence[tuple[float, str, str]]) -> list[DeadEntry | None]:
        pipe = self._redis.pipeline(transaction=False)
        for _, entry_id, _ in places:
            pipe.hmget(keys.job(entry_id), *FIELDS)
        rows = await pipe.execute()
        return [entry_of(place[1], row) for place, row in zip(places, rows, strict=True)]


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


def cursor_of(place: Place) -> str:
    """What a page hands out for the place of its last entry."""
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode().rstrip("=")


def _parse_cursor(cursor: str) -> Place | None:
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
