"""Questions that take several calls: a search with its query's vector, and the whole status."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vecfleet.common.collection import Collection
from vecfleet.common.errors import Unavailable, VecfleetError
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.fleet_state import read_redis_memory
from vecfleet.producer.found import CollectionStatus, FleetStatus, Found

_STATS_TIMEOUT_S = 2.0


async def query_vector(
    fleet: FleetClient, collection: Collection, query: str, instruction: str | None
) -> bytes:
    """The vector of a question to ``collection``, as raw float32."""
    card = await fleet.embedder(collection)
    prompt = card.query_prompt()
    if instruction is not None:
        prompt = card.prompt_of(instruction=instruction) or ""
    dimensions = collection.spec.dimension
    reply = await fleet.embed(
        [query], model=card, prompt=prompt, dimensions=dimensions, tenant=collection.tenant
    )
    return reply.vectors


async def find(
    fleet: FleetClient,
    collection: Collection,
    vector: bytes,
    *,
    top_k: int,
    threshold: float | None,
    exact: bool,
) -> list[Found]:
    """The documents nearest to ``vector``, raw float32, best first."""
    reply = await fleet.search(collection, vector, top_k=top_k, threshold=threshold, exact=exact)
    return [Found(hit.id, hit.score, hit.text, hit.metadata) for hit in reply.hits[0]]


async def reranked(
    fleet: FleetClient, query: str, hits: Sequence[Found], model: str | None, tenant: str
) -> list[Found]:
    """``hits`` with their relevance, the most relevant first."""
    reply = await fleet.rerank(query, [hit.text for hit in hits], model=model, tenant=tenant)
    ranked = [replace(hit, relevance=s) for hit, s in zip(hits, reply.scores, strict=True)]
    return sorted(ranked, key=lambda hit: hit.relevance or 0.0, reverse=True)


async def fleet_status(fleet: FleetClient, tenant: str) -> FleetStatus:
    """Models, workers, queues, collections and unfinished submissions."""
    try:
        collections = await fleet.collections(tenant=tenant)
    except Unavailable:
        collections = []  # no aggregator has told of any; the rest of the status says so, too
    stats = await asyncio.gather(*(_stats(fleet, collection) for collection in collections))
    return FleetStatus(
        models=tuple(await fleet.models()),
        state=await fleet.state(),
        collections=tuple(map(CollectionStatus, collections, stats)),
        submissions=tuple(await fleet.submissions.unfinished()),
        memory=await read_redis_memory(fleet.redis),
    )


async def _stats(fleet: FleetClient, collection: Collection) -> dict[str, Any] | None:
    try:
        async with asyncio.timeout(_STATS_TIMEOUT_S):
            return await fleet.collection_stats(collection)
    except (VecfleetError, TimeoutError):
        return None
