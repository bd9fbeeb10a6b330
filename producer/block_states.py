"""What Redis knows of a submission's blocks, asked by those whose answers may be lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import redis.asyncio

from vecfleet.common import codec, keys
from vecfleet.common.block_job import block_job_id
from vecfleet.common.redis_client import translated

Fate = Literal["committed", "refused", "waiting", "gone"]
_MOST_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Bits:
    """Which blocks are committed, and which are in the dead letter."""

    ok: bytes = b""
    bad: bytes = b""

    def fate(self, place: int) -> Fate:
        """What the bits say; "waiting" where they say nothing."""
        if _bit(self.ok, place):
            return "committed"
        return "refused" if _bit(self.bad, place) else "waiting"


class BlockStates:
    """Reads one submission's keys."""

    def __init__(self, client: redis.asyncio.Redis, submission: str) -> None:
        self._redis = client
        self._submission = submission
        self._key = keys.submission(submission)

    async def bits(self) -> Bits:
        """All bits of the submission."""
        with translated():
            ok, bad = cast(Any, await self._redis.mget(f"{self._key}:ok", f"{self._key}:bad"))
        return Bits(ok or b"", bad or b"")

    async def settled(self) -> int:
        """How many blocks have a bit."""
        with translated():
            ok = await self._redis.bitcount(f"{self._key}:ok")
            return int(ok + await self._redis.bitcount(f"{self._key}:bad"))

    async def look(self, places: Sequence[int]) -> tuple[str, list[Fate]]:
        """The submission's state ("" where Redis has lost it) and each block's fate."""
        state = ""
        fates: list[Fate] = []
        for start in range(0, len(places) or 1, _MOST_AT_ONCE):
            part = places[start : start + _MOST_AT_ONCE]
            pipe = self._redis.pipeline(transaction=False)
            pipe.hget(self._key, "state")
            for place in part:
                # The job first: it goes in the same step that sets a bit, so what is not there
                # now and has no bit afterwards is gone.
                pipe.exists(keys.job(block_job_id(self._submission, place)))
                pipe.getbit(f"{self._key}:ok", place)
                pipe.getbit(f"{self._key}:bad", place)
            with translated():
                answers = iter(await pipe.execute())
            state = (next(answers) or b"").decode()
            for _ in part:
                fates.append(_fate(next(answers), next(answers), next(answers)))
        return state, fates

    async def errors(self, start: int) -> list[dict[str, Any]]:
        """The refused documents that are kept with the submission, from number ``start`` on."""
        with translated():
            raw = cast(Any, await self._redis.lrange(f"{self._key}:errors", start, -1))
        return [codec.loads(entry) for entry in raw]


def _fate(is_there: int, ok: int, bad: int) -> Fate:
    if ok:
        return "committed"
    if bad:
        return "refused"
    return "waiting" if is_there else "gone"


def _bit(bitmap: bytes, place: int) -> bool:
    byte = place >> 3
    return byte < len(bitmap) and bool(bitmap[byte] & (128 >> (place & 7)))
