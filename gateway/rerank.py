"""Reranking in four shapes: Cohere v1 with Jina, Cohere v2, Text Embeddings Inference, articles."""

from __future__ import annotations

import math
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.document import check_text, check_texts, naming_texts
from vecfleet.common.errors import InvalidInput
from vecfleet.common.names import new_id
from vecfleet.common.payloads import RerankReply
from vecfleet.gateway import answers, fields, schemas
from vecfleet.gateway.body import Bodies
from vecfleet.gateway.config import GatewayConfig
from vecfleet.gateway.context import context_of, tenant_of
from vecfleet.gateway.embeddings import check_direction
from vecfleet.gateway.fleet import Fleet
from vecfleet.gateway.routing import Routes, json_response
from vecfleet.gateway.texts import check_size

_V1_FIELDS = frozenset(
    (
        "model",
        "query",
        "documents",
        "top_n",
        "return_documents",
        "rank_fields",
        "max_chunks_per_doc",
        "max_tokens_per_doc",
        "truncation",
        "instruction",
    )
)
_V2_FIELDS = frozenset(
    ("model", "query", "documents", "top_n", "max_tokens_per_doc", "priority", "instruction")
)
_TEI_FIELDS = frozenset(
    ("query", "texts", "raw_scores", "return_text", "truncate", "truncation_direction")
)
_PLAIN_FIELDS = frozenset(("query", "documents", "instruction", "top_k", "min_confidence", "model"))
_DOCUMENTS_A_SEARCH_UNIT = 100
_FAR = 1 << 31
_SMALLEST = 1e-7  # float32's step at 1: a score nearer to 0 or 1 has no finite logit


class Rerank:
    """A query and documents to scores."""

    def __init__(self, fleet: Fleet, bodies: Bodies, config: GatewayConfig) -> None:
        self._fleet = fleet
        self._bodies = bodies
        self._config = config

    def routes(self) -> Routes:
        """The router."""
        routes = Routes("rerank")
        shapes = (
            ("/v1/rerank", self.v1, "Rerank; Cohere's v1 and Jina's shape", "RERANK_V1"),
            ("/v2/rerank", self.v2, "Rerank; Cohere's v2 shape", "RERANK_V2"),
            ("/rerank", self.plain, "Rerank; TEI's shape or the plain one", "RERANK"),
        )
        for path, handler, says, shape in shapes:
            routes.add(
                "POST",
                path,
                handler,
                says=says,
                body=getattr(schemas, shape),
                answer=getattr(answers, shape),
                scopes=("rerank",),
            )
        return routes

    async def v1(self, request: Request) -> Response:
        """Cohere v1 and Jina: the union of both answers."""
        body = await self._bodies.read_object(request)
        fields.only(body, _V1_FIELDS)
        if body.get("rank_fields") not in (None, ["text"]):
            raise InvalidInput("rank_fields can only be ['text']", field="rank_fields")
        texts = fields.strings(body, "documents")
        if len(texts) <= self._config.limits.max_rerank_documents:  # more are refused unread
            texts = [_text_of(entry, i) for i, entry in enumerate(texts)]
        echo = fields.flag(body, "return_documents", False)
        top_n = fields.whole(body, "top_n", None, 1, _FAR)
        fields.whole(body, "max_chunks_per_doc", None, 1, _FAR)
        reply = await self._score(
            request, body, texts, truncate=fields.flag(body, "truncation", True)
        )
        tokens = sum(reply.tokens)
        return json_response(
            {
                "id": new_id(),
                "model": reply.model,
                "method": reply.method,
                "results": [
                    {
                        "index": i,
                        "relevance_score": reply.scores[i],
                        **({"document": {"text": texts[i]}} if echo else {}),
                    }
                    for i in ranked(reply.scores)[:top_n]
                ],
                "usage": {"total_tokens": tokens, "prompt_tokens": tokens},
                "meta": _meta("1", len(texts)),
            }
        )

    async def v2(self, request: Request) -> Response:
        """Cohere v2: documents are strings, and are not sent back."""
        body = await self._bodies.read_object(request)
        fields.only(body, _V2_FIELDS)
        texts = fields.strings(body, "documents")
        top_n = fields.whole(body, "top_n", None, 1, _FAR)
        fields.whole(body, "priority", None, 0, 999)
        reply = await self._score(request, body, texts)
        results = [
            {"index": i, "relevance_score": reply.scores[i]} for i in ranked(reply.scores)[:top_n]
        ]
        return json_response(
            {"id": new_id(), "results": results, "meta": _meta("2", len(texts))},
        )

    async def plain(self, request: Request) -> Response:
        """``texts``: Text Embeddings Inference. ``documents``: with confidences and a rank."""
        body = await self._bodies.read_object(request)
        return await (self._documents if "documents" in body else self._tei)(request, body)

    async def _tei(self, request: Request, body: dict[str, Any]) -> Response:
        fields.only(body, _TEI_FIELDS)
        check_direction(body)
        texts = fields.strings(body, "texts")
        raw = fields.flag(body, "raw_scores", False)
        echo = fields.flag(body, "return_text", False)
        reply = await self._score(
            request, body, texts, "texts", truncate=fields.flag(body, "truncate", False)
        )
        return json_response(
            [
                {
                    "index": i,
                    "score": _logit(reply.scores[i]) if raw else reply.scores[i],
                    **({"text": texts[i]} if echo else {}),
                }
                for i in ranked(reply.scores)
            ]
        )

    async def _documents(self, request: Request, body: dict[str, Any]) -> Response:
        fields.only(body, _PLAIN_FIELDS)
        texts = fields.strings(body, "documents")
        top_k = fields.whole(body, "top_k", 10, 1, self._config.limits.max_top_k)
        least = fields.number(body, "min_confidence", 0.5, 0.0, 1.0) or 0.0
        reply = await self._score(request, body, texts)
        sure = [i for i in ranked(reply.scores) if confidence(reply.scores[i]) >= least]
        return json_response(
            {
                "query": body["query"],
                "ranked_documents": [
                    {
                        "document": texts[i],
                        "relevance_score": reply.scores[i],
                        "confidence": confidence(reply.scores[i]),
                        "rank": rank,
                    }
                    for rank, i in enumerate(sure[:top_k], 1)
                ],
                "total_processed": len(texts),
                "method": reply.method,
                "processing_time_ms": context_of(request).elapsed_ms,
            }
        )

    async def _score(
        self,
        request: Request,
        body: dict[str, Any],
        texts: list[Any],
        field: str = "documents",
        *,
        truncate: bool = True,
    ) -> RerankReply:
        bounds = self._config.limits
        query = body.get("query")
        query_size = check_text(query, "query")
        size = check_texts(texts, field, bounds.max_rerank_documents)
        instruction = body.get("instruction")
        if instruction is not None:
            query_size += check_text(instruction, "instruction")
        check_size(size + query_size * len(texts), len(texts), field, bounds)
        name = fields.word(body, "model", self._config.rerank_model)
        card = await self._fleet.find_model(name, "rerank")
        _check_cut(body, card.max_tokens)
        with naming_texts(field):
            reply = await self._fleet.rerank(
                str(query),
                texts,
                model=card,
                instruction=instruction or "",
                truncate=truncate,
                tenant=tenant_of(request),
            )
        context_of(request).note_inference(
            reply.queue_ms, reply.inference_ms, sum(reply.tokens), len(reply.truncated)
        )
        # In a header, for two of the shapes have no room for how the scores came about.
        context_of(request).headers.append((b"x-rerank-method", reply.method.encode()))
        return reply


def ranked(scores: tuple[float, ...]) -> list[int]:
    """Places by falling score; equal scores keep the documents' order."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


def confidence(score: float) -> float:
    """How far a score is from undecided: |P(yes) - P(no)| / (P(yes) + P(no))."""
    return abs(2 * score - 1)


def _logit(score: float) -> float:
    held = min(max(score, _SMALLEST), 1 - _SMALLEST)
    return math.log(held / (1 - held))


def _text_of(entry: Any, place: int) -> Any:
    if not isinstance(entry, dict):
        return entry
    fields.only(entry, frozenset(("text",)), f"documents[{place}].")
    return entry.get("text")


def _check_cut(body: dict[str, Any], max_tokens: int) -> None:
    asked = fields.whole(body, "max_tokens_per_doc", None, 1, _FAR)
    if asked is not None and asked < max_tokens:
        raise InvalidInput(
            f"max_tokens_per_doc cannot be less than {max_tokens}, where this model cuts",
            field="max_tokens_per_doc",
        )


def _meta(version: str, documents: int) -> dict[str, Any]:
    units = math.ceil(documents / _DOCUMENTS_A_SEARCH_UNIT)
    return {"api_version": {"version": version}, "billed_units": {"search_units": units}}
