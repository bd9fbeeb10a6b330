"""Who serves what: the announcements of workers and the copy of the catalogue, read from Redis."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite
from typing import Any, cast

import redis.asyncio

from vecfleet.common import codec, keys
from vecfleet.common.collection import Collection
from vecfleet.common.errors import (
    CorruptPayload,
    InvalidInput,
    SpaceMismatch,
    Unavailable,
    UnknownCollection,
    UnknownModel,
    VecfleetError,
)
from vecfleet.common.model import ModelCard, Task
from vecfleet.common.names import check_name
from vecfleet.common.rare_log import RareLog
from vecfleet.common.redis_client import translated

log = logging.getLogger(__name__)
rare = RareLog(log)

_FRESH_S = 1.0
_KEPT_RECORDS = 1024
_USABLE_S = 5.0  # older than fresh, but good enough while they are read again

_PUBLISHED_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that was announced in the last day."""

    card: ModelCard
    workers: tuple[str, ...]  # those that live
    last_seen_ms: int
    tokens_per_s: float = 0.0  # what those that live say they do together
    is_rate_known: bool = False  # each of them has had enough to do to know


@dataclass(frozen=True, slots=True)
class _Rate:
    tokens_per_s: float
    is_known: bool  # learnt while there was enough to do; see worker/status.py


class Directory:
    """Models, workers and collections; models are remembered for a second."""

    def __init__(
        self, client: redis.asyncio.Redis, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._redis = client
        self._clock = clock
        self._models: list[ServedModel] = []
        self._read_at = -_USABLE_S
        self._reading: asyncio.Task[None] | None = None

    async def models(self) -> list[ServedModel]:
        """The announced models, by name."""
        if self._clock() - self._read_at >= _FRESH_S:
            await asyncio.shield(self._read())
        return self._models

    async def find(self, name: str | None, task: Task) -> ServedModel:
        """The model ``name`` (or the only one) that does ``task``; raises ``UnknownModel``."""
        found = self._pick(name, task)
        age = self._clock() - self._read_at
        if found is None or not found.workers or age >= _USABLE_S:
            await asyncio.shield(self._read())  # it may have come up just now
            found = self._pick(name, task)
        elif age >= _FRESH_S:
            self._read()  # beside this call, which need not wait for it
        if found is not None:
            return found
        able = sorted(m.card.name for m in self._models if task in m.card.tasks)
        if name is None and len(able) > 1:
            raise InvalidInput(f"name a model; served are {', '.join(able)}", field="model")
        hint = f"; served are {', '.join(able)}" if able else "; no worker has announced one"
        raise UnknownModel(
            f"no model {name!r} that can {task}{hint}"
            if name is not None
            else f"no model that can {task}{hint}",
            field="model",
        )

    async def embedder(self, collection: Collection) -> ModelCard:
        """A model whose vectors can be compared with the collection's, one that is served if any.

        Raises ``SpaceMismatch`` where the collection's model has other weights now.
        """
        spec = collection.spec
        able = [m for m in await self.models() if "embed" in m.card.tasks]
        same = [m for m in able if m.card.space == spec.space]
        for served in sorted(same, key=lambda m: (not m.workers, m.card.name != spec.model)):
            return served.card
        found = await self.find(spec.model, "embed")
        if found.card.space == spec.space:
            return found.card
        raise SpaceMismatch(
            f"{spec.model} is now served with other weights than collection {collection.name} "
            "was made with"
        )

    def _pick(self, name: str | None, task: Task) -> ServedModel | None:
        able = [m for m in self._models if task in m.card.tasks]
        if name is None:
            dedicated = [m for m in able if m.card.tasks == (task,)]
            if len(able) > 1 and len(dedicated) == 1:
                return dedicated[0]
            return able[0] if len(able) == 1 else None
        return next((m for m in able if m.card.name == name), None)

    def _read(self) -> asyncio.Task[None]:
        """The reading of the models that is under way; many callers share one."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._refresh(), name="directory")
            self._reading.add_done_callback(_note_failure)
        return self._reading

    async def _refresh(self) -> None:
        self._models = await self._read_models()
        self._read_at = self._clock()

    async def _read_models(self) -> list[ServedModel]:
        with translated():
            seconds, micros = cast(Any, await self._redis.time())
            now_ms = seconds * 1000 + micros // 1000
            rows = cast(Any, await self._redis.zrange(keys.MODELS, 0, -1, withscores=True))
            names = [name.decode(errors="replace") for name, _ in rows]
            raw = cast(Any, await self._redis.mget([keys.model(n) for n in names])) if names else []
            cards = [None if card is None else _card_of(card) for card in raw]
            pipe = self._redis.pipeline(transaction=False)
            for card in cards:
                if card is not None:
                    pool = f"{card.tasks[0]}.{card.space}"
                    pipe.zrangebyscore(keys.live(pool), now_ms, "+inf")
            alive = iter(await pipe.execute())
        served = [
            ServedModel(
                card,
                tuple(worker.decode(errors="replace") for worker in next(alive)),
                int(_number(seen)),
            )
            for card, (_, seen) in zip(cards, rows, strict=True)
            if card is not None
        ]
        rates = await self._rates(sorted({worker for model in served for worker in model.workers}))
        return [
            replace(
                model,
                tokens_per_s=sum(rates[worker].tokens_per_s for worker in model.workers),
                is_rate_known=all(rates[worker].is_known for worker in model.workers),
            )
            for model in served
        ]

    async def _rates(self, workers: Sequence[str]) -> dict[str, _Rate]:
        """What these workers say they do."""
        with translated():
            pipe = self._redis.pipeline(transaction=False)
            for worker in workers:
                pipe.hmget(keys.worker(worker), "tokens_per_s", "was_full")
            return {
                worker: _Rate(_number(rate), was_full == b"1")
                for worker, (rate, was_full) in zip(workers, await pipe.execute(), strict=True)
            }

    def known_rate(self, queue: keys.QueueName) -> float:
        """Tokens a second of a queue's workers when the models were last read; 0 if unknown."""
        return max(
            (
                model.tokens_per_s
                for model in self._models
                if model.card.space == queue.target
                and queue.task in model.card.tasks
                and model.is_rate_known
            ),
            default=0.0,
        )

    async def tokens_ahead(self, queue: keys.QueueName) -> int:
        """Tokens that are served until what waits in a queue now has been.

        The tenants that have something waiting take turns, so no more than its own for each.
        """
        with translated():
            pipe = self._redis.pipeline(transaction=False)
            pipe.hget(keys.load(queue), "tokens")
            pipe.hget(keys.load_of_all(queue), "tokens")
            pipe.zcard(keys.line(queue))
            own, everyone, tenants = (int(_number(count)) for count in await pipe.execute())
        return min(own * max(1, tenants), max(own, everyone))

    async def tokens_per_s(self, pool: str) -> float:
        """What the live workers of a pool say they do together."""
        with translated():
            workers = cast(Any, await self._redis.zrange(keys.live(pool), 0, -1))
        rates = await self._rates([worker.decode(errors="replace") for worker in workers])
        return sum(rate.tokens_per_s for rate in rates.values())

    async def collection(self, name: str, tenant: str = keys.DEFAULT_TENANT) -> Collection:
        """A collection's record.

        Raises ``InvalidName``, ``UnknownCollection``, or ``Unavailable`` while Redis has not been
        told which collections there are.
        """
        check_name(name)
        key = keys.collections(tenant)
        with translated():
            raw = cast(Any, await self._redis.hget(key, name))
            if raw is None:  # at one moment with the question whether that means anything
                pipe = self._redis.pipeline(transaction=True)
                pipe.hget(key, name)
                pipe.exists(keys.PUBLISHED)
                raw, is_published = await pipe.execute()
        if raw is None and not is_published:
            raise _unpublished()
        if raw is None:
            raise UnknownCollection(
                f"there is no collection {name!r}; create it first", field="collection"
            )
        try:
            return _collection_of(raw)
        except CorruptPayload:
            rare.warning("the record of collection %r cannot be read", name)
            raise UnknownCollection(
                f"the record of collection {name!r} cannot be read; an aggregator that runs writes "
                "it again within ten seconds",
                field="collection",
            ) from None

    async def collections(self, tenant: str = keys.DEFAULT_TENANT) -> list[Collection]:
        """All collections of a tenant, by name; raises ``Unavailable`` as ``collection`` does.

        One whose record cannot be read is left out.
        """
        with translated():
            pipe = self._redis.pipeline(transaction=True)
            pipe.hvals(keys.collections(tenant))
            pipe.exists(keys.PUBLISHED)
            raw, is_published = await pipe.execute()
        if not raw and not is_published:
            raise _unpublished()
        found = []
        for record in raw:
            try:
                found.append(_collection_of(record))
            except CorruptPayload as error:
                rare.warning("a collection's record cannot be read: %s", error.message)
        return sorted(found, key=lambda collection: collection.name)


@lru_cache(maxsize=_KEPT_RECORDS)
def _collection_of(raw: bytes) -> Collection:
    """A record as it stands in Redis; it seldom changes, and each request reads one."""
    return Collection.from_wire(codec.loads(raw))


def _card_of(raw: bytes) -> ModelCard | None:
    """A worker's card; None for one that cannot be read: the other models must not suffer."""
    try:
        return ModelCard.from_wire(codec.loads(raw))
    except CorruptPayload as error:
        rare.warning("a model's card cannot be read: %s", error.message)
        return None


def _number(value: bytes | float | None) -> float:
    """What a worker told; 0 for what is none."""
    try:
        number = float(value or 0)
    except ValueError:
        return 0.0
    return number if isfinite(number) else 0.0


def _unpublished() -> Unavailable:
    return Unavailable(
        "no aggregator has told which collections there are; one that runs does within ten seconds",
        field="collection",
        retry_after_s=_PUBLISHED_AFTER_S,
    )


def _note_failure(reading: asyncio.Task[None]) -> None:
    # Whoever awaits the reading gets its error too; a reading in the background has only this.
    if not reading.cancelled() and isinstance(reading.exception(), VecfleetError):
        log.warning("cannot read the models: %s", reading.exception())
