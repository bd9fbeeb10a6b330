"""All that a client can ask of the fleet through Redis; the gateway and producers stand on it."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import redis.asyncio

from vecfleet.common import keys, limits, payloads
from vecfleet.common.admission import Admission
from vecfleet.common.block_job import block_jobs, block_route, delete_job, delete_route
from vecfleet.common.collection import Collection, CollectionSpec
from vecfleet.common.dead_letter import DeadLetter
from vecfleet.common.directory import Directory, ServedModel
from vecfleet.common.document import Block
from vecfleet.common.errors import NoWorker
from vecfleet.common.fleet_state import FleetState, read_fleet_state
from vecfleet.common.metadata import read_metadata
from vecfleet.common.model import ModelCard, Task
from vecfleet.common.names import check_name
from vecfleet.common.payloads import EmbedReply, Hit, RerankReply, SearchReply, StoredDocument
from vecfleet.common.queue_client import Admitted, QueueClient
from vecfleet.common.reply_box import ReplyBox
from vecfleet.common.round_trip import Call, RoundTrips, cost_of, parts_of
from vecfleet.common.submission import Submissions

DEFAULT_TIMEOUT_S = 30.0
CATALOG_TIMEOUT_S = 15.0


class FleetClient:
    """Embed, rerank, search and manage collections; one per event loop."""

    def __init__(
        self,
        client: redis.asyncio.Redis,
        *,
        admission: Admission | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """``timeout_s`` bounds every call that waits for an answer."""
        self.redis = client
        admission = admission or Admission()
        self.queues = QueueClient(client, admission)
        self.submissions = Submissions(client, admission)
        self.directory = Directory(client)
        self.dead_letter = DeadLetter(client, admission)
        self.box = ReplyBox(client)
        self._trips = RoundTrips(
            self.queues,
            self.directory,
            self.box,
            timeout_s=timeout_s,
            max_wait_s=admission.max_wait_s,
        )

    async def __aenter__(self) -> Self:
        await self.box.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.box.close()
        await self.redis.aclose()

    # Models

    async def models(self) -> list[ServedModel]:
        """The models announced in the last day, those with live workers told apart."""
        return await self.directory.models()

    async def embedder(self, collection: Collection) -> ModelCard:
        """A model for queries to ``collection``; raises ``SpaceMismatch``, ``UnknownModel``."""
        return await self.directory.embedder(collection)

    async def find_model(self, name: str | None, task: Task, *, live: bool = True) -> ModelCard:
        """The card of a model that does ``task``; the only one that does when ``name`` is None.

        Raises ``UnknownModel``, or ``NoWorker`` when ``live`` and nobody serves it now.
        """
        served = await self.directory.find(name, task)
        if live and not served.workers:
            raise NoWorker(
                f"no worker serves {served.card.name} now; start one or try again later",
                field="model",
                retry_after_s=5.0,
            )
        return served.card

    async def _card(self, model: str | ModelCard | None, task: Task) -> ModelCard:
        return model if isinstance(model, ModelCard) else await self.find_model(model, task)

    # Embedding and reranking

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str | ModelCard | None = None,
        prompt_name: str | None = None,
        prompt: str = "",
        instruction: str | None = None,
        dimensions: int | None = None,
        truncate: bool = True,
        lane: keys.Lane = "interactive",
        timeout_s: float | None = None,
        tenant: str = keys.DEFAULT_TENANT,
    ) -> EmbedReply:
        """Vectors of ``texts``, which the caller has checked; long lists are cut into blocks.

        Each text is read after the model's prompt of ``prompt_name``, after ``prompt`` itself, or
        as a question for the task of ``instruction``. ``dimensions`` cuts the vectors of a model
        that is trained for it. Raises an ``InvalidInput`` that names what the model does not take.
        """
        card = await self._card(model, "embed")
        asked = {"prompt": prompt or None, "prompt_name": prompt_name, "instruction": instruction}
        before = card.prompt_of(**asked)
        options: dict[str, Any] = {k: value for k, value in asked.items() if value is not None}
        options["truncate"] = truncate
        if card.vector_length(dimensions) != card.dimension:
            options["dimensions"] = dimensions
        queue = keys.embed_queue(card.space, lane, tenant)
        each = cost_of([before]) if before else 0
        calls = [
            Call(
                queue,
                payloads.EMBED,
                {"texts": list(part), **options},
                cost_of(part) + len(part) * each,
                first,
            )
            for first, part in parts_of(texts)
        ]
        replies = [EmbedReply.from_wire(body) for body in await self._trips.ask(calls, timeout_s)]
        return replies[0] if len(replies) == 1 else EmbedReply.joined(replies)

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        model: str | ModelCard | None = None,
        instruction: str = "",
        truncate: bool = True,
        lane: keys.Lane = "interactive",
        timeout_s: float | None = None,
        tenant: str = keys.DEFAULT_TENANT,
    ) -> RerankReply:
        """Relevance of each document to ``query``, which the caller has checked."""
        card = await self._card(model, "rerank")
        payload = {"query": query, "documents": list(documents), "truncate": truncate}
        if instruction:
            payload["instruction"] = instruction
        tokens = cost_of(documents) + len(documents) * cost_of([query])
        call = Call(keys.rerank_queue(card.space, lane, tenant), payloads.RERANK, payload, tokens)
        return RerankReply.from_wire((await self._trips.ask([call], timeout_s))[0])

    # Collections

    async def create_collection(
        self,
        name: str,
        *,
        model: str | None = None,
        policy: str = "auto",
        recall_target: float = 0.98,
        versions: str = "assigned",
        dimensions: int | None = None,
        tenant: str = keys.DEFAULT_TENANT,
    ) -> Collection:
        """Create a collection for a model's space; the same call again returns the same one.

        ``dimensions``: its vectors are cut to so many, by a model that is trained for it.

        Raises ``InvalidName``, ``InvalidInput``, ``UnknownModel`` or ``CollectionConflict``.
        """
        check_name(name)
        card = await self.find_model(model, "embed", live=False)
        spec = CollectionSpec(
            model=card.name,
            space=card.space,
            dimension=card.vector_length(dimensions),
            policy=policy,  # type: ignore[arg-type]
            recall_target=recall_target,
            versions=versions,  # type: ignore[arg-type]
        ).checked()
        record = await self._ask_catalog(
            payloads.CREATE, {"name": name, "tenant": tenant, "spec": spec.to_wire()}
        )
        return Collection.from_wire(record)

    async def delete_collection(self, name: str, *, tenant: str = keys.DEFAULT_TENANT) -> str:
        """Delete a collection and its documents; returns its uid. Raises ``UnknownCollection``."""
        meant = await self.collection(name, tenant=tenant)
        call = {"name": name, "tenant": tenant, "uid": meant.uid}
        body = await self._ask_catalog(payloads.DELETE, call)
        return str(body["uid"])

    async def collection(self, name: str, *, tenant: str = keys.DEFAULT_TENANT) -> Collection:
        """A collection's record; raises ``UnknownCollection``."""
        return await self.directory.collection(name, tenant)

    async def collections(self, *, tenant: str = keys.DEFAULT_TENANT) -> list[Collection]:
        """All collections of a tenant, by name."""
        return await self.directory.collections(tenant)

    async def collection_stats(self, collection: Collection) -> dict[str, Any]:
        """Documents, segments and bytes, as the search process sees them now."""
        return await self._ask_search(collection, payloads.STATS, {})

    # Documents

    async def check_room(self, collection: Collection, body_bytes: int = 0) -> None:
        """Raise ``QueueFull`` where documents for ``collection`` would be refused.

        A hint, at little cost, from which a caller may learn that before it reads the documents:
        ``body_bytes`` of JSON, of which at least a third is taken to be theirs.
        """
        tokens = limits.estimate_tokens(body_bytes // 3, 1)
        queue = keys.embed_queue(collection.spec.space, "bulk", collection.tenant)
        await self._trips.check_room(queue, collection.merge_queue, tokens)

    async def enqueue_block(
        self,
        collection: Collection,
        block: Block,
        *,
        submission: str,
        place: int,
        truncate: bool = True,
        answered: bool = False,
    ) -> Admitted:
        """Put one block of documents on its way into ``collection``.

        The job's id is the submission's and the block's place, so that the same call again
        changes nothing. With ``answered``, the merge's reply comes to ``box`` under
        ``block_job_id(submission, place)``; call ``box.expect`` before.
        """
        return await self.enqueue_blocks(
            collection,
            [block],
            submission=submission,
            first_place=place,
            truncate=truncate,
            answered=answered,
        )

    async def enqueue_blocks(
        self,
        collection: Collection,
        blocks: Sequence[Block],
        *,
        submission: str,
        first_place: int = 0,
        places: Sequence[int] | None = None,
        truncate: bool = True,
        answered: bool = False,
    ) -> Admitted:
        """``enqueue_block`` for many blocks: all are admitted, or none.

        They follow each other from ``first_place`` on, or stand at ``places``. Blocks that carry
        versions keep them, also where the collection assigns them: a resumed producer gives each
        block the version of its first try.
        """
        if places is None:
            places = range(first_place, first_place + len(blocks))
        jobs = block_jobs(collection, blocks, submission, places, truncate=truncate)
        queue = keys.embed_queue(collection.spec.space, "bulk", collection.tenant)
        box = self.box.name if answered else ""
        return await self._trips.enqueue(
            queue, jobs, block_route(collection, blocks, submission, box)
        )

    async def enqueue_delete(
        self,
        collection: Collection,
        ids: Sequence[str],
        *,
        submission: str,
        place: int = 0,
        version: int | None = None,
        answered: bool = False,
    ) -> Admitted:
        """Put the deletion of documents on its way; ``version`` where the collection wants one."""
        job = delete_job(ids, submission, place, version)
        box = self.box.name if answered else ""
        route = delete_route(collection, submission, box)
        return await self._trips.enqueue(collection.merge_queue, [job], route)

    async def documents(
        self, collection: Collection, ids: Sequence[str]
    ) -> list[StoredDocument | None]:
        """The documents with these ids, None where there is none; raises ``ReplyTooLarge``."""
        payload = {"ids": list(ids)}
        body = await self._ask_search(collection, payloads.GET, payload, tokens=1 + len(ids))
        return [
            None
            if row is None
            else StoredDocument(row["id"], row["text"], _metadata_of(row), row["version"])
            for row in body["documents"]
        ]

    async def unchanged(self, collection: Collection, id_keys: bytes, content_keys: bytes) -> bytes:
        """One byte a document: 1 where id, text and metadata stand in the collection already."""
        payload = {"id_keys": id_keys, "content_keys": content_keys}
        body = await self._ask_search(collection, payloads.UNCHANGED, payload)
        return bytes(body["unchanged"])

    async def search(
        self,
        collection: Collection,
        vectors: bytes,
        *,
        top_k: int = 10,
        threshold: float | None = None,
        exact: bool = False,
        timeout_s: float | None = None,
    ) -> SearchReply:
        """The nearest documents of each query vector (raw float32), best first.

        Raises ``InvalidVector`` when the bytes do not make whole vectors of the collection's
        dimension; the search process refuses NaN and zero vectors. ``ReplyTooLarge``: the texts of
        all hits come to more than ``limits.MAX_REPLY_BYTES``.
        """
        payload: dict[str, Any] = {"vectors": vectors, "top_k": top_k}
        if threshold is not None:
            payload["threshold"] = threshold
        if exact:
            payload["exact"] = True
        queries = len(vectors) // (payloads.FLOAT_BYTES * collection.spec.dimension)
        tokens = limits.search_tokens(max(1, queries), top_k, exact=exact)
        body = await self._ask_search(
            collection, payloads.SEARCH, payload, tokens=tokens, timeout_s=timeout_s
        )
        return SearchReply(
            tuple(
                tuple(Hit(hit["id"], hit["score"], hit["text"], _metadata_of(hit)) for hit in hits)
                for hits in body["hits"]
            ),
            body["queue_ms"],
            body["search_ms"],
        )

    async def state(self) -> FleetState:
        """How full the queues are and which workers live; for metrics and status."""
        return await read_fleet_state(self.redis)

    # The way there

    async def _ask_search(
        self,
        collection: Collection,
        function: str,
        payload: dict[str, Any],
        *,
        tokens: int = 1,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        call = Call(collection.search_queue, function, {"uid": collection.uid, **payload}, tokens)
        return (await self._trips.ask([call], timeout_s))[0]

    async def _ask_catalog(self, function: str, payload: dict[str, Any]) -> dict[str, Any]:
        call = Call(keys.catalog_queue(tenant=payload["tenant"]), function, payload, 1)
        return (await self._trips.ask([call], CATALOG_TIMEOUT_S))[0]


def _metadata_of(row: dict[str, Any]) -> dict[str, Any] | None:
    return read_metadata(row.get("metadata"), row["id"])
