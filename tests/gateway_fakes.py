"""A fleet in memory behind the gateway's ``Fleet`` protocol, and a client of an app over it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from gateway_responder import CARD, vector

from vecfleet.common.collection import Collection, CollectionSpec
from vecfleet.common.directory import ServedModel
from vecfleet.common.document import Block
from vecfleet.common.errors import (
    CollectionConflict,
    NoWorker,
    SpaceMismatch,
    UnknownCollection,
    UnknownModel,
    UnknownSubmission,
)
from vecfleet.common.fleet_state import FleetState, LineLoad, LiveWorker, QueueLoad
from vecfleet.common.keys import DEFAULT_TENANT
from vecfleet.common.model import ModelCard, Task
from vecfleet.common.names import check_name
from vecfleet.common.payloads import EmbedReply, Hit, RerankReply, SearchReply, StoredDocument
from vecfleet.common.queue_client import Admitted
from vecfleet.common.submission import Submission
from vecfleet.gateway.app import create_app
from vecfleet.gateway.config import GatewayConfig, GatewayLimits


class FakeBook:
    """Submissions in a dict."""

    def __init__(self) -> None:
        self.kept: dict[str, Submission] = {}

    async def open(
        self,
        submission_id: str,
        *,
        tenant: str,
        collection: str,
        uid: str,
        first_block: str = "",
        once: bool = False,
    ) -> str:
        fresh = Submission(submission_id, "open", collection, tenant, None, 0, 0, 1000, None)
        fresh = dataclasses.replace(fresh, first_block=first_block)
        self.kept.setdefault(submission_id, fresh)
        return self.kept[submission_id].state

    async def close(
        self, submission_id: str, *, blocks: int, documents: int, content: str = ""
    ) -> str:
        content = self.kept[submission_id].content or content
        self._change(submission_id, state="closed", documents=documents, content=content)
        return "closed"

    async def get(self, submission_id: str, *, with_errors: bool = False) -> Submission:
        if submission_id not in self.kept:
            raise UnknownSubmission
        return self.kept[submission_id]

    async def cancel(self, submission_id: str) -> Submission:
        await self.get(submission_id)
        self._change(submission_id, state="cancelled")
        return self.kept[submission_id]

    async def discard(self, submission_id: str, spare_s: int = 0) -> None:
        if spare_s == 0:
            del self.kept[submission_id]

    def _change(self, submission_id: str, **changes: Any) -> None:
        self.kept[submission_id] = dataclasses.replace(self.kept[submission_id], **changes)


class FakeFleet:
    """One model that embeds and reranks, and collections that keep what is enqueued."""

    def __init__(self, card: ModelCard = CARD) -> None:
        self.submissions = FakeBook()
        self.cards = [card]
        self.workers: tuple[str, ...] = ("w1",)
        self.fail: Exception | None = None  # raised by embed and rerank
        self.full: list[Exception] = []  # raised by enqueue_blocks, one a call
        self.no_room: Exception | None = None  # raised by check_room
        self.looked: list[int] = []
        self.stuck = asyncio.Event()  # embed waits for it where ``hang`` is set
        self.hang = False
        self.cancelled = asyncio.Event()
        self.calls: list[dict[str, Any]] = []
        self.tenants: list[str] = []  # of each embed and rerank
        self.blocks: list[tuple[str, int, Block]] = []
        self.deleted: list[tuple[str, int | None]] = []
        self.known: dict[str, Collection] = {}

    async def models(self) -> list[ServedModel]:
        return [ServedModel(card, self.workers, 1_700_000_000_000, 1234.5) for card in self.cards]

    async def find_model(self, name: str | None, task: Task, *, live: bool = True) -> ModelCard:
        for card in self.cards:
            if task in card.tasks and name in (None, card.name):
                if live and not self.workers:
                    raise NoWorker(field="model", retry_after_s=5.0)
                return card
        raise UnknownModel(field="model")

    async def embedder(self, collection: Collection) -> ModelCard:
        for card in self.cards:
            if card.space == collection.spec.space:
                return card
        raise SpaceMismatch

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: Any = None,
        prompt_name: str | None = None,
        prompt: str = "",
        instruction: str | None = None,
        dimensions: int | None = None,
        truncate: bool = True,
        tenant: str,
    ) -> EmbedReply:
        self.tenants.append(tenant)
        asked = {"prompt_name": prompt_name, "prompt": prompt, "instruction": instruction}
        given = {name: value for name, value in asked.items() if value}
        self.calls.append({"texts": texts, "dimensions": dimensions, "truncate": truncate, **given})
        length = model.vector_length(dimensions)
        if self.hang:
            try:
                await self.stuck.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if self.fail is not None:
            raise self.fail
        return EmbedReply(
            self.cards[0].name,
            length,
            b"".join(vector(text, length) for text in texts),
            tuple(len(text.split()) for text in texts),
            (),
            1.5,
            2.5,
        )

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        model: Any = None,
        instruction: str = "",
        truncate: bool = True,
        tenant: str,
    ) -> RerankReply:
        self.tenants.append(tenant)
        self.calls.append({"query": query, "documents": documents, "instruction": instruction})
        if self.fail is not None:
            raise self.fail
        words = set(query.split())
        scores = tuple(len(words & set(text.split())) / len(words) for text in documents)
        tokens = tuple(len(text.split()) for text in documents)
        return RerankReply(self.cards[0].name, "cosine", scores, tokens, (), 1.0, 2.0)

    async def create_collection(
        self,
        name: str,
        *,
        model: str | None = None,
        policy: Any = "auto",
        recall_target: float = 0.98,
        versions: Any = "assigned",
        dimensions: int | None = None,
        tenant: str,
    ) -> Collection:
        card = await self.find_model(model, "embed", live=False)
        length = card.vector_length(dimensions)
        spec = CollectionSpec(
            card.name, card.space, length, policy, recall_target, versions
        ).checked()
        fresh = Collection(name, "c0ffee" * 5 + "00", spec, tenant)
        found = self.known.setdefault(_place(name, tenant), fresh)
        if found.spec != spec:
            raise CollectionConflict
        return found

    async def delete_collection(self, name: str, *, tenant: str) -> str:
        uid = (await self.collection(name, tenant=tenant)).uid
        del self.known[_place(name, tenant)]
        return uid

    async def collection(self, name: str, *, tenant: str) -> Collection:
        check_name(name)
        if _place(name, tenant) not in self.known:
            raise UnknownCollection(field="collection")
        return self.known[_place(name, tenant)]

    async def collections(self, *, tenant: str) -> list[Collection]:
        return [found for found in self.known.values() if found.tenant == tenant]

    async def collection_stats(self, collection: Collection) -> dict[str, Any]:
        return {"documents": sum(len(block) for _, _, block in self.blocks), "segments": 1}

    async def check_room(self, collection: Collection, body_bytes: int = 0) -> None:
        self.looked.append(body_bytes)
        if self.no_room is not None:
            raise self.no_room

    async def enqueue_blocks(
        self,
        collection: Collection,
        blocks: Sequence[Block],
        *,
        submission: str,
        first_place: int = 0,
        truncate: bool = True,
    ) -> Admitted:
        if self.full:
            raise self.full.pop(0)
        for place, block in enumerate(blocks, first_place):
            self.blocks.append((submission, place, block))
        return Admitted((0,) * len(blocks))

    async def enqueue_delete(
        self,
        collection: Collection,
        ids: Sequence[str],
        *,
        submission: str,
        place: int = 0,
        version: int | None = None,
    ) -> Admitted:
        self.deleted += [(document_id, version) for document_id in ids]
        return Admitted((0,))

    async def documents(
        self, collection: Collection, ids: Sequence[str]
    ) -> list[StoredDocument | None]:
        kept = {row.id: row for row in self._rows()}
        return [kept.get(document_id) for document_id in ids]

    async def search(
        self,
        collection: Collection,
        vectors: bytes,
        *,
        top_k: int = 10,
        threshold: float | None = None,
        exact: bool = False,
    ) -> SearchReply:
        length = collection.spec.dimension
        query = struct.unpack(f"<{length}f", vectors)
        self.calls.append({"query_vector": query, "top_k": top_k, "exact": exact})
        hits = []
        for row in self._rows():
            its = struct.unpack(f"<{length}f", vector(row.text, length))
            score = sum(a * b for a, b in zip(query, its, strict=True))
            if threshold is None or score >= threshold:
                hits.append(Hit(row.id, score, row.text, row.metadata))
        hits.sort(key=lambda hit: -hit.score)
        return SearchReply((tuple(hits[:top_k]),), 0.5, 0.7)

    async def state(self) -> FleetState:
        return FleetState(
            (QueueLoad("vf.-.embed.0123456789abcdef.bulk", 3, 700, 2048, 2, 1, 4, 5000),),
            (LiveWorker("w1", {"tokens_per_s": "1234.5", "device": "cuda:0"}),),
            (LineLoad("embed.0123456789abcdef.bulk", 9, 900, 4096, 2),),
        )

    def _rows(self) -> list[StoredDocument]:
        return [
            StoredDocument(i, text, None if meta is None else json.loads(meta), version or 1)
            for _, _, block in self.blocks
            for i, text, meta, version in zip(
                block.ids, block.texts, block.metadata, block.versions, strict=True
            )
        ]


def _place(name: str, tenant: str) -> str:
    return name if tenant == DEFAULT_TENANT else f"{tenant}/{name}"


@asynccontextmanager
async def gateway_client(
    fleet: FakeFleet, limits: GatewayLimits | None = None, **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway over ``fleet``, without a socket between them."""
    config = GatewayConfig(redis_url="unused", limits=limits or GatewayLimits(), **settings)
    transport = httpx.ASGITransport(app=create_app(fleet, config))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
