"""Runs ``vecfleet.embed``: texts to vectors for whoever waits, blocks of documents to shards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from vecfleet.common import codec, payloads
from vecfleet.common.document import check_document_id, check_repeated, check_text
from vecfleet.common.errors import (
    CorruptPayload,
    EngineFailed,
    InvalidInput,
    PoisonText,
    SpaceMismatch,
    VecfleetError,
)
from vecfleet.common.limits import (
    BLOCK_DOCUMENTS,
    MAX_INPUTS,
    estimate_tokens,
)
from vecfleet.common.metadata import check_metadata
from vecfleet.worker.activity import Activity
from vecfleet.worker.engine import Embeddings, Engine, Priority
from vecfleet.worker.job import Answer, ClaimedJob, Commit, Failure, HandOn, Outcome, Refused
from vecfleet.worker.matryoshka import shortened
from vecfleet.worker.quarantine import Quarantine, raise_errors, verdict
from vecfleet.worker.shard import build_shard

_PROMPTS = ("prompt", "prompt_name", "instruction")


@dataclass(slots=True)
class _Block:
    """The columns of a block, checked."""

    ids: list[str]
    texts: list[str]
    metadata: list[bytes | None] | None
    versions: list[int]
    truncate: bool
    dimensions: int  # of its vectors

    def without(self, places: Sequence[int]) -> _Block:
        """The block without some of its documents."""
        gone = set(places)
        return self._picked([i for i in range(len(self.ids)) if i not in gone])

    def only(self, places: Sequence[int]) -> _Block:
        """Some of the block's documents."""
        return self._picked(places)

    def _picked(self, places: Sequence[int]) -> _Block:
        return _Block(
            [self.ids[i] for i in places],
            [self.texts[i] for i in places],
            None if self.metadata is None else [self.metadata[i] for i in places],
            [self.versions[i] for i in places],
            self.truncate,
            self.dimensions,
        )

    def to_wire(self) -> dict[str, Any]:
        """As a payload of ``vecfleet.embed``."""
        wire: dict[str, Any] = {
            "ids": self.ids,
            "texts": self.texts,
            "versions": self.versions,
            "truncate": self.truncate,
            "dimensions": self.dimensions,
        }
        if self.metadata is not None:
            wire["metadata"] = self.metadata
        return wire


class EmbedHandler:
    """Checks payloads, calls the engine, and packs what it says."""

    def __init__(
        self, engine: Engine, quarantine: Quarantine, packing: Activity | None = None
    ) -> None:
        """``packing`` is told of shards that are packed beside the loop."""
        self._packing = packing or Activity()
        self._engine = engine
        self._quarantine = quarantine
        # Packing a shard takes a millisecond: beside the loop, or every query would wait for it.
        self._packer = ThreadPoolExecutor(1, thread_name_prefix="pack")

    async def __call__(self, job: ClaimedJob) -> Outcome:
        """Raises a ``VecfleetError`` where the whole job is at fault."""
        payload = job.payload
        if not isinstance(payload, dict):
            raise CorruptPayload("an embed job's payload is a map")
        if "ids" in payload:
            return await self._embed_block(job, payload)
        return await self._embed_texts(job, payload)

    async def _embed_texts(self, job: ClaimedJob, payload: dict[str, Any]) -> Outcome:
        texts = _checked_texts(payload.get("texts"), MAX_INPUTS)
        card = self._engine.card
        dimensions = card.vector_length(payload.get("dimensions"))
        prompt = card.prompt_of(**{name: payload.get(name) for name in _PROMPTS})
        for name in ("prompt", "instruction"):
            if payload.get(name) is not None:
                check_repeated(prompt, len(texts), name)
        started = time.perf_counter()
        embed = partial(
            self._embed,
            dimensions=dimensions,
            priority=_priority(job),
            prompt=prompt,
            truncate=payload.get("truncate") is not False,
        )
        if job.condemned:
            return verdict(job, lambda place: {"texts": texts[place : place + 1]})
        if job.is_suspect:
            result = _joined(raise_errors(await self._one_by_one(job, texts, embed)))
        else:
            self._quarantine.poison.check(job)
            result = await embed(texts)
            await self._quarantine.acquit(job)
        return Answer(
            {
                "model": card.name,
                "dimension": dimensions,
                "vectors": result.vectors.astype("<f4", copy=False).tobytes(),
                "tokens": result.tokens.tolist(),
                "truncated": np.flatnonzero(result.truncated).tolist(),
                "queue_ms": job.queue_ms,
                "inference_ms": (time.perf_counter() - started) * 1000,
            }
        )

    async def _embed(self, texts: Sequence[str], *, dimensions: int, **options: Any) -> Embeddings:
        """What the engine makes of ``texts``, the vectors cut to ``dimensions``.

        Raises ``EngineFailed`` with the places of those whose vectors cannot be cut.
        """
        found = await self._engine.embed(texts, **options)
        return replace(found, vectors=shortened(found.vectors, dimensions))

    async def _embed_block(self, job: ClaimedJob, payload: dict[str, Any]) -> Outcome:
        if payload.get("space") != self._engine.card.space:
            raise SpaceMismatch(
                f"the block is for space {payload.get('space')}, "
                f"this worker embeds into {self._engine.card.space}"
            )
        uid = payload.get("uid")
        if not isinstance(uid, str) or not job.merge_queue:
            raise CorruptPayload("a block of documents names its collection and its merge queue")
        dimensions = self._engine.card.vector_length(payload.get("dimensions"))
        block = _parse_block(payload, job.version, dimensions)
        embed = self._embed_each if job.is_suspect else self._embed_what_can_be
        embeddings, refused = await embed(job, block)
        if not job.is_suspect:
            not_run = [entry.place for entry in refused if isinstance(entry.error, InvalidInput)]
            await self._quarantine.acquit(job, not_run)
        if refused and job.is_apart:
            return Failure(refused[0].error)  # it is the dead letter's already, and stays there
        if refused:
            refused = [_with_data(entry, block, payload) for entry in refused]
            block = block.without([entry.place for entry in refused])
        if not block.ids:
            return Commit(0, _merge_body(job.version, 0, refused), refused)
        assert embeddings is not None
        data = await asyncio.get_running_loop().run_in_executor(
            self._packer, self._pack, job.id, block, embeddings
        )
        return HandOn(job.merge_queue, data, len(block.ids), refused)

    async def _embed_each(
        self, job: ClaimedJob, block: _Block
    ) -> tuple[Embeddings | None, list[Refused]]:
        """Embed a block whose worker died: text by text, those left out that have killed."""
        embed = self._bulk(block)
        told = await self._one_by_one(job, block.texts, embed)
        errors = {i: e for i, e in enumerate(told) if isinstance(e, VecfleetError)}
        good = [found for found in told if isinstance(found, Embeddings)]
        refused = [Refused(i, block.ids[i], _alone(error)) for i, error in errors.items()]
        if not good:
            return None, refused
        return _joined(good), refused

    def _bulk(self, block: _Block) -> Callable[[Sequence[str]], Awaitable[Embeddings]]:
        """Embeds texts as those of ``block`` are to be."""
        return partial(
            self._embed,
            dimensions=block.dimensions,
            priority=Priority.BULK,
            truncate=block.truncate,
        )

    async def _one_by_one(
        self, job: ClaimedJob, texts: Sequence[str], embed: Callable[..., Awaitable[Embeddings]]
    ) -> list[Embeddings | EngineFailed | InvalidInput]:
        return await self._quarantine.one_by_one(
            job,
            len(texts),
            lambda place: embed([texts[place]]),
            texts=payloads.computed_together(job.payload),
        )

    async def _embed_what_can_be(
        self, job: ClaimedJob, block: _Block
    ) -> tuple[Embeddings | None, list[Refused]]:
        """Embed the block; texts that the engine refuses are told apart and the rest goes on."""
        known = self._quarantine.poison.places(job.queue.pool, job.payload)
        refused = [Refused(i, block.ids[i], PoisonText(field="text")) for i in known]
        left = [i for i in range(len(block.texts)) if i not in known]
        embed = self._bulk(block)
        while left:
            try:
                texts = (
                    block.texts if len(left) == len(block.texts) else [block.texts[i] for i in left]
                )
                return await embed(texts), refused
            except VecfleetError as error:
                places = getattr(error, "indices", ())
                if not places:
                    raise
                bad = [left[i] for i in places]
                refused += [Refused(i, block.ids[i], _alone(error, n)) for n, i in enumerate(bad)]
                left = [i for i in left if i not in bad]
        return None, refused

    def _pack(self, job_id: str, block: _Block, embeddings: Embeddings) -> bytes:
        with self._packing.doing():
            shard = build_shard(
                job_id,
                self._engine.card.space,
                block.dimensions,
                ids=block.ids,
                texts=block.texts,
                vectors=embeddings.vectors,
                versions=block.versions,
                metadata=block.metadata,
            )
        return codec.pack_call(payloads.MERGE, shard)


def _priority(job: ClaimedJob) -> Priority:
    return Priority.INTERACTIVE if job.queue.lane == "interactive" else Priority.BULK


def _joined(parts: Sequence[Embeddings]) -> Embeddings:
    """One result for texts that were embedded one by one."""
    return Embeddings(
        np.concatenate([part.vectors for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.truncated for part in parts]),
    )


def _with_data(entry: Refused, block: _Block, payload: dict[str, Any]) -> Refused:
    """With a call that embeds this document alone, for the dead letter."""
    alone = {
        **block.only([entry.place]).to_wire(),
        "uid": payload["uid"],
        "space": payload["space"],
    }
    size = len(block.texts[entry.place].encode())
    data = codec.pack_call(payloads.EMBED, alone)
    return replace(entry, data=data, tokens=estimate_tokens(size, 1))


def _alone(error: VecfleetError, number: int = 0) -> VecfleetError:
    """The error as it is said of one document, the ``number``th of those it is about."""
    each = error.each if isinstance(error, EngineFailed) else ()
    return type(error)(each[number] if each else error.message, field="text")


def _merge_body(version: int, documents: int, refused: Sequence[Refused]) -> dict[str, Any]:
    return {
        "version": version,
        "documents": documents,
        "refused": [entry.to_wire() for entry in refused],
    }


def _checked_texts(texts: object, most: int) -> list[str]:
    if not isinstance(texts, list) or not texts:
        raise InvalidInput("texts must be a list of strings that is not empty", field="texts")
    if len(texts) > most:
        raise InvalidInput(f"texts has {len(texts)} items, at most {most}", field="texts")
    for place, text in enumerate(texts):
        check_text(text, f"texts[{place}]")
    return texts


def _parse_block(payload: dict[str, Any], version: int, dimensions: int) -> _Block:
    texts = _checked_texts(payload.get("texts"), BLOCK_DOCUMENTS)
    ids = payload["ids"]
    if not isinstance(ids, list) or len(ids) != len(texts):
        raise CorruptPayload("ids and texts must be lists of one length")
    for document_id in ids:
        check_document_id(document_id)
    metadata = payload.get("metadata")
    if metadata is not None:
        _check_metadata(metadata, len(texts))
    versions = payload.get("versions")
    if version:
        versions = [version] * len(texts)
    elif (
        not isinstance(versions, list)
        or len(versions) != len(texts)
        or not all(type(v) is int and 0 < v < 2**63 for v in versions)
    ):
        raise CorruptPayload("versions must be positive whole numbers, one a text")
    whole = payload.get("truncate") is False
    return _Block(ids, texts, metadata, versions, not whole, dimensions)


def _check_metadata(metadata: object, count: int) -> None:
    if not isinstance(metadata, list) or len(metadata) != count:
        raise CorruptPayload("metadata must be a list of one entry a text")
    for entry in metadata:
        if entry is not None:
            check_metadata(entry)
