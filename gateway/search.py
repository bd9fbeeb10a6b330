"""Searching a collection: POST /collections/{name}/search, and POST /search as in the articles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.collection import Collection
from vecfleet.common.document import check_text
from vecfleet.common.errors import InvalidInput, UnknownCollection
from vecfleet.common.payloads import Hit, RerankReply
from vecfleet.common.vectors import parse_vector
from vecfleet.gateway import answers, fields, schemas
from vecfleet.gateway.body import Bodies
from vecfleet.gateway.config import GatewayConfig
from vecfleet.gateway.context import RequestContext, context_of
from vecfleet.gateway.fleet import Fleet
from vecfleet.gateway.rerank import ranked
from vecfleet.gateway.routing import Routes, json_response
from vecfleet.gateway.unread import Unread

_FIELDS = frozenset(
    ("query", "vector", "top_k", "threshold", "exact", "task_description", "instruction", "rerank")
)
_PLAIN_FIELDS = frozenset(("query", "task_description", "top_k", "score_threshold"))
_RERANK_FIELDS = frozenset(("model", "top_n", "candidates", "instruction"))


@dataclass(frozen=True, slots=True)
class Reranking:
    """What to do with the first hits of a search."""

    model: str | None = None
    top_n: int | None = None
    candidates: int | None = None
    instruction: str = ""


class Search:
    """Query texts and vectors to documents."""

    def __init__(self, fleet: Fleet, bodies: Bodies, config: GatewayConfig, unread: Unread) -> None:
        self._fleet = fleet
        self._unread = unread
        self._bodies = bodies
        self._config = config

    def routes(self) -> Routes:
        """The router."""
        routes = Routes("search")
        routes.add(
            "POST",
            "/collections/{collection}/search",
            self.collection,
            says="Search a collection, with reranking at will",
            body=schemas.SEARCH,
            answer=answers.SEARCH,
            links=answers.LINKS_OF_SEARCH,
            scopes=("search",),
        )
        routes.add(
            "POST",
            "/search",
            self.plain,
            says="Search the default collection",
            body=schemas.PLAIN_SEARCH,
            answer=answers.PLAIN_SEARCH,
            scopes=("search",),
        )
        return routes

    async def collection(self, request: Request) -> Response:
        """``query`` or ``vector``; hits by falling score, reranked where ``rerank`` is given."""
        context = context_of(request)
        body = await self._bodies.read_object(request)
        fields.only(body, _FIELDS)
        top_k = fields.whole(body, "top_k", 10, 1, self._config.limits.max_top_k) or 10
        threshold = fields.number(body, "threshold", None, -1.0, 1.0)
        exact = fields.flag(body, "exact", False)
        rerank = self._reranking(body)
        self._unread.check_documents(context, top_k)
        collection = await self._fleet.collection(
            request.path_params["collection"], tenant=context.caller.tenant
        )
        vector = await self._query_vector(context, collection, body)
        reach = max(top_k, rerank.candidates or 0) if rerank else top_k
        reply = await self._fleet.search(
            collection, vector, top_k=reach, threshold=threshold, exact=exact
        )
        answer: dict[str, Any] = {
            "collection": collection.name,
            "model": collection.spec.model,
            "method": "cosine",
        }
        results = [_result(hit) for hit in reply.hits[0]]
        if rerank is not None:
            results = await self._rerank(
                context.caller.tenant, str(body["query"]), results, rerank, answer
            )
            top_k = rerank.top_n or top_k
        answer["results"] = results[:top_k]
        answer["search_ms"] = reply.search_ms
        answer["total_ms"] = context.elapsed_ms
        return json_response(answer)

    async def plain(self, request: Request) -> Response:
        """The articles' shape, over the configured collection or the only one."""
        context = context_of(request)
        body = await self._bodies.read_object(request)
        fields.only(body, _PLAIN_FIELDS)
        top_k = fields.whole(body, "top_k", 10, 1, self._config.limits.max_top_k) or 10
        threshold = fields.number(body, "score_threshold", 0.7, -1.0, 1.0)
        check_text(body.get("query"), "query")
        self._unread.check_documents(context, top_k)
        collection = await self._default_collection(context.caller.tenant)
        vector = await self._query_vector(context, collection, body)
        reply = await self._fleet.search(collection, vector, top_k=top_k, threshold=threshold)
        results = [
            {
                "doc_id": hit.id,
                "text": hit.text,
                "similarity_score": hit.score,
                "length": len(hit.text),
            }
            for hit in reply.hits[0]
        ]
        return json_response(
            {
                "query": body["query"],
                "results": results,
                "total_found": len(results),
                "processing_time_ms": context.elapsed_ms,
            }
        )

    async def _default_collection(self, tenant: str) -> Collection:
        if self._config.collection is not None:
            return await self._fleet.collection(self._config.collection, tenant=tenant)
        collections = await self._fleet.collections(tenant=tenant)
        if len(collections) == 1:
            return collections[0]
        raise UnknownCollection(
            f"there are {len(collections)} collections and none is the default; "
            "use /collections/{name}/search"
        )

    async def _query_vector(
        self, context: RequestContext, collection: Collection, body: dict[str, Any]
    ) -> bytes:
        """The raw vector to look for, from the body's ``query`` or ``vector``."""
        query, vector = body.get("query"), body.get("vector")
        task, instruction = body.get("task_description"), body.get("instruction")
        if task is not None:
            check_text(task, "task_description")
        if vector is not None:
            if query is not None and not body.get("rerank"):
                raise InvalidInput("send query or vector, not both", field="vector")
            if instruction is not None:
                raise InvalidInput("instruction is for a query, not a vector", field="instruction")
            return parse_vector(vector, collection.spec.dimension)
        check_text(query, "query")
        card = await self._fleet.embedder(collection)
        if instruction is None:
            prompt = card.query_prompt(task or "")  # the articles' field, for any model
        elif task is not None:
            raise InvalidInput(
                "send instruction or task_description, not both", field="instruction"
            )
        else:
            prompt = card.prompt_of(instruction=instruction) or ""
        reply = await self._fleet.embed(
            [str(query)],
            model=card,
            prompt=prompt,
            dimensions=collection.spec.dimension,
            tenant=context.caller.tenant,
        )
        context.note_inference(
            reply.queue_ms, reply.inference_ms, sum(reply.tokens), len(reply.truncated)
        )
        return reply.vectors

    def _reranking(self, body: dict[str, Any]) -> Reranking | None:
        asked = body.get("rerank")
        if asked is None or asked is False:
            return None
        if body.get("query") is None:
            raise InvalidInput("rerank needs a query", field="query")
        check_text(body["query"], "query")
        if asked is True:
            return Reranking(self._config.rerank_model)
        if not isinstance(asked, dict):
            raise InvalidInput("rerank must be true or an object", field="rerank")
        fields.only(asked, _RERANK_FIELDS, "rerank.")
        bounds = self._config.limits
        instruction = asked.get("instruction")
        if instruction is not None:
            check_text(instruction, "rerank.instruction")
        return Reranking(
            fields.word(asked, "model", self._config.rerank_model),
            fields.whole(asked, "top_n", None, 1, bounds.max_top_k),
            fields.whole(asked, "candidates", None, 1, bounds.max_rerank_documents),
            instruction or "",
        )

    async def _rerank(
        self,
        tenant: str,
        query: str,
        results: list[dict[str, Any]],
        rerank: Reranking,
        answer: dict[str, Any],
    ) -> list[dict[str, Any]]:
        card = await self._fleet.find_model(rerank.model, "rerank")
        answer["rerank"] = {"model": card.name, "method": card.rerank_method}
        if not results:
            return results
        reply: RerankReply = await self._fleet.rerank(
            query,
            [result["text"] for result in results],
            model=card,
            instruction=rerank.instruction,
            tenant=tenant,
        )
        answer["rerank"]["method"] = reply.method
        return [{**results[i], "relevance_score": reply.scores[i]} for i in ranked(reply.scores)]


def _result(hit: Hit) -> dict[str, Any]:
    result: dict[str, Any] = {"id": hit.id, "score": hit.score, "text": hit.text}
    if hit.metadata is not None:
        result["metadata"] = hit.metadata
    return result
