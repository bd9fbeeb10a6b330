"""Reranks with an embedding model alone: by the cosine of query and document."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vecfleet.common.errors import EngineFailed, TextsTooLong
from vecfleet.worker.engine import Engine, Priority, Scores


async def rerank_by_cosine(
    engine: Engine,
    pairs: Sequence[tuple[str, str]],
    *,
    document_prompt: str,
    priority: Priority,
    instruction: str,
    truncate: bool,
) -> Scores:
    """(1 + cosine) / 2; each distinct query is embedded once, before the documents.

    Errors as in ``Engine.rerank``, with the places of pairs.
    """
    places: dict[str, int] = {}
    asks = [places.setdefault(query, len(places)) for query, _ in pairs]
    before = engine.card.query_prompt(instruction)
    texts = [before + query for query in places]
    texts += [document_prompt + document for _, document in pairs]
    try:
        found = await engine.embed(texts, priority=priority, prompt="", truncate=truncate)
    except (TextsTooLong, EngineFailed) as error:
        # The places of texts, queries first, become those of pairs.
        failed = set(error.indices)
        if isinstance(error, TextsTooLong) and min(failed) < len(places):
            error = TextsTooLong(
                "the query is longer than the model reads; shorten it or allow truncation",
                indices=error.indices,
                field="query",
            )
        indices = [
            pair for pair, ask in enumerate(asks) if ask in failed or len(places) + pair in failed
        ]
        if isinstance(error, EngineFailed) and failed and min(failed) < len(places):
            why = error.each[0] if error.each else error.message
            error = EngineFailed(f"query: {why}", field="query")
        raise type(error)(error.message, indices=indices, field=error.field) from error
    queries, documents = found.vectors[: len(places)], found.vectors[len(places) :]
    cosines = np.einsum("nd,nd->n", queries[asks], documents) if pairs else np.empty(0)
    tokens, truncated = found.tokens[len(places) :], found.truncated[len(places) :]
    for query in range(len(places)):
        tokens[asks.index(query)] += found.tokens[query]  # computed once, counted once
    scores = np.clip((1 + cosines) / 2, 0, 1).astype(np.float32)
    return Scores(scores, tokens, truncated)
