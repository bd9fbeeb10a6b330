"""The front of every engine that runs a model: prompts, tokens, and which task the model is for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import TypeVar

from vecfleet.common.errors import InvalidInput
from vecfleet.common.model import ModelCard
from vecfleet.worker.calls import Encode, Rows
from vecfleet.worker.cosine_rerank import rerank_by_cosine
from vecfleet.worker.engine import Embeddings, EngineStats, Priority, Scores
from vecfleet.worker.model_files import ModelFiles
from vecfleet.worker.tokenizer import TextTokenizer, Tokens

T = TypeVar("T")


class TextEngine(ABC):
    """``embed`` and ``rerank`` over one way to compute rows for encoded texts."""

    card: ModelCard
    device: str

    def __init__(self, files: ModelFiles, tokenizer: TextTokenizer) -> None:
        self._files = files
        self._tokenizer = tokenizer

    @abstractmethod
    async def _compute(
        self, texts: Sequence[T], encode: Encode[T, Tokens], priority: Priority, *, whole: bool
    ) -> Rows:
        """Rows for ``texts``; ``whole``: all are encoded before the first is computed.

        Raises ``EngineFailed`` with the places of texts that failed, and what ``encode`` raises.
        """

    @property
    @abstractmethod
    def stats(self) -> EngineStats:
        """See ``Engine.stats``."""

    @abstractmethod
    async def close(self) -> None:
        """See ``Engine.close``."""

    async def embed(
        self,
        texts: Sequence[str],
        *,
        priority: Priority,
        prompt: str | None = None,
        truncate: bool = True,
    ) -> Embeddings:
        """See ``Engine.embed``."""
        if self._files.kind != "embedding":
            raise InvalidInput(f"{self.card.name} reranks; it does not embed", field="model")
        before = self._files.document_prompt if prompt is None else prompt
        if before:
            texts = [before + text for text in texts]
        encode = partial(self._tokenizer.texts, truncate=truncate)
        rows = await self._compute(texts, encode, priority, whole=not truncate)
        return Embeddings(rows.values, rows.tokens, rows.truncated)

    async def rerank(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        priority: Priority,
        instruction: str = "",
        truncate: bool = True,
    ) -> Scores:
        """See ``Engine.rerank``."""
        if self._files.kind == "embedding":
            return await rerank_by_cosine(
                self,
                pairs,
                document_prompt=self._files.document_prompt,
                priority=priority,
                instruction=instruction,
                truncate=truncate,
            )
        encode = partial(
            self._tokenizer.question_pairs,
            kind=self._files.kind,
            instruction=instruction,
            truncate=truncate,
        )
        rows = await self._compute(pairs, encode, priority, whole=not truncate)
        return Scores(rows.values[:, 0], rows.tokens, rows.truncated)
