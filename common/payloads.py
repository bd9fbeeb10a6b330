"""The functions that jobs call, and the payload and reply of each: the wire contract.

All payloads are msgpack maps; vectors are raw little-endian float32, row after row.

vecfleet.embed      {texts, truncate, prompt_name? or prompt? or instruction?, dimensions?},
                    answered by
                    {model, dimension, vectors, tokens, truncated, queue_ms, inference_ms}
                    tokens: one count a text; truncated: places of the texts that were cut
vecfleet.embed      of a block of documents on their way into a collection:
                    {ids, texts, metadata?, versions?, truncate, uid, space, dimensions?}; not
                    answered: the block becomes a merge job
vecfleet.rerank     {query, documents, truncate, instruction?}, answered by
                    {model, method, scores, tokens, truncated, queue_ms, inference_ms}
vecfleet.merge      a shard (bytes), or {delete: [id], version?: n, versions?: [n]}
                    answered by {version, documents}: how many of the block are in the index; why
                    others are not stands with the submission
vecfleet.search     {uid, vectors, top_k, threshold?, exact?}, answered by
                    {hits: [[{id, score, text, metadata?}]], queue_ms, search_ms}
vecfleet.get        {uid, ids}, answered by {documents: [{id, text, metadata?, version} or nil]}
vecfleet.unchanged  {uid, id_keys, content_keys}, answered by {unchanged: one byte a document}
vecfleet.stats      {uid}, answered by {documents, segments, bytes, indexed, generation}
vecfleet.create     {name, tenant, spec}, answered by the collection's record
vecfleet.delete     {name, tenant}, answered by {uid}

A reply travels as ``[job id, "ok", body]`` or ``[job id, "error", {code, message, field?}]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EMBED = "vecfleet.embed"
RERANK = "vecfleet.rerank"
MERGE = "vecfleet.merge"
SEARCH = "vecfleet.search"
GET = "vecfleet.get"
UNCHANGED = "vecfleet.unchanged"
STATS = "vecfleet.stats"
CREATE = "vecfleet.create"
DELETE = "vecfleet.delete"

FLOAT_BYTES = 4


_BEFORE = ("prompt", "prompt_name", "instruction")


def computed_together(payload: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """For each text of an embed or rerank call, all that the engine computes with it.

    What a worker died of is remembered by that: a text is not to blame for a prompt. Raises
    ``KeyError`` where the payload is neither.
    """
    if "query" in payload:
        beside = (str(payload["query"]), str(payload.get("instruction") or ""))
        return [(*beside, text) for text in payload["documents"]]
    before = tuple(str(payload.get(name) or "") for name in _BEFORE)
    return [(*before, text) for text in payload["texts"]]


@dataclass(frozen=True, slots=True)
class EmbedReply:
    """Vectors of n texts as raw bytes; nothing here needs numpy."""

    model: str
    dimension: int
    vectors: bytes  # n * dimension little-endian float32, row after row
    tokens: tuple[int, ...]
    truncated: tuple[int, ...]  # places of the texts that were cut
    queue_ms: float
    inference_ms: float

    def row(self, place: int) -> bytes:
        """The raw vector of one text."""
        width = self.dimension * FLOAT_BYTES
        return self.vectors[place * width : (place + 1) * width]

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def from_wire(cls, body: dict[str, Any]) -> EmbedReply:
        """The reply of one job."""
        return cls(
            body["model"],
            body["dimension"],
            body["vectors"],
            tuple(body["tokens"]),
            tuple(body["truncated"]),
            body["queue_ms"],
            body["inference_ms"],
        )

    @classmethod
    def joined(cls, replies: Sequence[EmbedReply]) -> EmbedReply:
        """One reply for texts that went in several jobs, in their order."""
        truncated: list[int] = []
        before = 0
        for reply in replies:
            truncated += [before + place for place in reply.truncated]
            before += len(reply)
        return cls(
            replies[0].model,
            replies[0].dimension,
            b"".join(reply.vectors for reply in replies),
            tuple(count for reply in replies for count in reply.tokens),
            tuple(truncated),
            max(reply.queue_ms for reply in replies),
            max(reply.inference_ms for reply in replies),
        )


@dataclass(frozen=True, slots=True)
class RerankReply:
    """Relevance of n documents to a query, in the order of the documents."""

    model: str
    method: str  # "cross-encoder", "qwen3" or "cosine"
    scores: tuple[float, ...]
    tokens: tuple[int, ...]
    truncated: tuple[int, ...]
    queue_ms: float
    inference_ms: float

    @classmethod
    def from_wire(cls, body: dict[str, Any]) -> RerankReply:
        """The reply of one job."""
        return cls(
            body["model"],
            body["method"],
            tuple(memoryview(body["scores"]).cast("f")),
            tuple(body["tokens"]),
            tuple(body["truncated"]),
            body["queue_ms"],
            body["inference_ms"],
        )


@dataclass(frozen=True, slots=True)
class Hit:
    """One found document."""

    id: str
    score: float  # cosine similarity
    text: str
    metadata: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """One document as the collection keeps it."""

    id: str
    text: str
    metadata: dict[str, Any] | None
    version: int


@dataclass(frozen=True, slots=True)
class SearchReply:
    """Hits of each query, best first."""

    hits: tuple[tuple[Hit, ...], ...]
    queue_ms: float
    search_ms: float
