"""Runs ``vecfleet.rerank``: a query and documents to relevance scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from vecfleet.common.document import check_repeated, check_text, check_texts
from vecfleet.common.errors import CorruptPayload, InvalidInput
from vecfleet.common.limits import MAX_RERANK_DOCUMENTS
from vecfleet.common.payloads import computed_together
from vecfleet.worker.engine import Engine, Priority, Scores
from vecfleet.worker.job import Answer, ClaimedJob, Outcome
from vecfleet.worker.quarantine import Quarantine, raise_errors, verdict


class RerankHandler:
    """Checks payloads, calls the engine, and packs the scores."""

    def __init__(self, engine: Engine, quarantine: Quarantine) -> None:
        self._engine = engine
        self._quarantine = quarantine

    async def __call__(self, job: ClaimedJob) -> Outcome:
        """Raises a ``VecfleetError`` where the payload is at fault."""
        payload = job.payload
        if not isinstance(payload, dict):
            raise CorruptPayload("a rerank job's payload is a map")
        query, documents = payload.get("query"), payload.get("documents")
        check_text(query, "query")
        if not isinstance(documents, list):
            raise InvalidInput("documents must be a list of strings", field="documents")
        check_texts(documents, "documents", MAX_RERANK_DOCUMENTS)
        instruction = payload.get("instruction") or ""
        check_repeated(instruction, len(documents), "instruction")
        check_repeated(query, len(documents), "query")
        bulk = job.queue.lane == "bulk"
        started = time.perf_counter()
        pairs = [(str(query), document) for document in documents]
        score = partial(
            self._engine.rerank,
            priority=Priority.BULK if bulk else Priority.INTERACTIVE,
            instruction=instruction,
            truncate=payload.get("truncate") is not False,
        )
        if not job.is_suspect:
            self._quarantine.poison.check(job)
            result = await score(pairs)
            await self._quarantine.acquit(job)
        elif job.condemned:
            return verdict(job, lambda place: {"documents": documents[place : place + 1]})
        else:
            told = await self._quarantine.one_by_one(
                job,
                len(pairs),
                lambda place: score([pairs[place]]),
                texts=computed_together(payload),
            )
            result = _joined(raise_errors(told))
        return Answer(
            {
                "model": self._engine.card.name,
                "method": self._engine.card.rerank_method,
                "scores": result.scores.astype("<f4", copy=False).tobytes(),
                "tokens": result.tokens.tolist(),
                "truncated": np.flatnonzero(result.truncated).tolist(),
                "queue_ms": job.queue_ms,
                "inference_ms": (time.perf_counter() - started) * 1000,
            }
        )


def _joined(parts: Sequence[Scores]) -> Scores:
    """One result for pairs that were scored one by one."""
    return Scores(
        np.concatenate([part.scores for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.truncated for part in parts]),
    )
