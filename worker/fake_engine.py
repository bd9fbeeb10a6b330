"""Engines without a model: one for tests of the queue, one that costs nothing for its benches."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from vecfleet.common.errors import InvalidInput, TextsTooLong, Unavailable
from vecfleet.common.model import ModelCard, Space
from vecfleet.worker.batching import Batcher
from vecfleet.worker.calls import Encoded, OnStep
from vecfleet.worker.engine import Embeddings, EngineStats, Priority, Scores
from vecfleet.worker.step_loop import StepLoop

POISON = "[[poison]]"  # a step that holds such a text fails
ABORT = "[[abort]]"  # a step that holds such a text kills the process
HANG = "[[hang]]"  # a step that holds such a text never ends
BREAK = "[[break]]"  # a step that holds such a text fails, and all steps after it
NAN = "[[nan]]"  # the row of such a text is NaN
ZERO = "[[zero]]"  # the row of such a text is zero
NO_MEMORY = "[[no-memory]]"  # a step of several texts that holds such a text is out of memory

NULL_DIMENSION = 384
_NULL_ROWS = 16_384
_NULL_CLUSTERS = 512


def fake_vector(text: str, dimension: int) -> NDArray[np.float32]:
    """The unit vector that ``FakeEngine`` gives for ``text`` (its prompt included)."""
    seed = hashlib.sha256(text.encode()).digest()
    words = np.frombuffer(hashlib.shake_256(seed).digest(2 * dimension), "<i2")
    vector = words.astype(np.float32) + np.float32(0.5)
    return vector / np.linalg.norm(vector)


def fake_score(query: str, document: str) -> float:
    """The share of the query's words that the document has, as ``FakeEngine`` scores a pair."""
    words = set(query.lower().split())
    return len(words & set(document.lower().split())) / len(words) if words else 0.0


@dataclass(frozen=True, slots=True)
class FakeSettings:
    """How the fake engine behaves."""

    name: str = "fake"
    dimension: int = 32
    max_tokens: int = 64
    step_tokens: int = 1024
    step_s: float = 0.0  # how long each step takes
    document_prompt: str = ""
    on_step: OnStep | None = None  # called on the step thread before each step; may block


class _FakeRunner:
    """Rows of ``fake_vector`` for payloads (text,), of ``fake_score`` for (query, document)."""

    def __init__(self, settings: FakeSettings, width: int, broken: threading.Event) -> None:
        self.width = width
        self._settings = settings
        self._broken = broken

    def make_batcher(self) -> Batcher[Any, tuple[str, ...]]:
        return Batcher(self._settings.step_tokens)

    def run(self, payloads: Sequence[tuple[str, ...]]) -> NDArray[np.float32]:
        if self._settings.step_s:
            time.sleep(self._settings.step_s)
        rows = np.empty((len(payloads), self.width), np.float32)
        for row, payload in zip(rows, payloads, strict=True):
            if any(ABORT in text for text in payload):
                os.abort()
            if any(HANG in text for text in payload):
                threading.Event().wait()
            if any(BREAK in text for text in payload):
                self._broken.set()
            if self._broken.is_set():
                raise RuntimeError("broken for good")
            if any(POISON in text for text in payload):
                raise RuntimeError("poison")
            if len(payloads) > 1 and any(NO_MEMORY in text for text in payload):
                raise MemoryError("out of memory")
            if any(NAN in text for text in payload):
                row[:] = np.nan
            elif any(ZERO in text for text in payload):
                row[:] = 0.0
            elif len(payload) == 2:
                row[0] = fake_score(*payload)
            else:
                row[:] = fake_vector(payload[0], self.width)
        return rows

    def free_memory(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)

    def close(self) -> None:
        pass


class FakeEngine:
    """Vectors that tests can recompute, with a real engine's batching, cuts and failures.

    A token is a word; a vector is that of the whole text, cut or not.
    """

    def __init__(self, settings: FakeSettings) -> None:
        self.device = "cpu"
        self._settings = settings
        self._broken = threading.Event()
        self._embedder = StepLoop[tuple[str, ...]]("fake", on_step=settings.on_step)
        self._scorer = StepLoop[tuple[str, ...]]("fake-scores", on_step=settings.on_step)
        prompts = {"document": settings.document_prompt} if settings.document_prompt else {}
        space = Space(
            "fa6e", "mean", True, settings.dimension, settings.document_prompt, settings.max_tokens
        )
        self.card = ModelCard(
            name=settings.name,
            tasks=("embed", "rerank"),
            space=space.id,
            dimension=settings.dimension,
            max_tokens=settings.max_tokens,
            dtype="float32",
            engine="fake",
            rerank_method="cross-encoder",
            prompts=prompts,
            pooling="mean",
        )

    @classmethod
    async def load(cls, settings: FakeSettings | None = None) -> FakeEngine:
        """Start the engine."""
        engine = cls(settings or FakeSettings())
        for loop, width in ((engine._embedder, engine.card.dimension), (engine._scorer, 1)):
            await loop.start(partial(_FakeRunner, engine._settings, width, engine._broken))
        return engine

    @property
    def stats(self) -> EngineStats:
        """Counters of embedding; it stalls where either stalls."""
        stats = self._embedder.stats
        return replace(stats, stalled_s=max(stats.stalled_s, self._scorer.stats.stalled_s))

    async def embed(
        self,
        texts: Sequence[str],
        *,
        priority: Priority,
        prompt: str | None = None,
        truncate: bool = True,
    ) -> Embeddings:
        """See ``Engine.embed``."""
        before = self._settings.document_prompt if prompt is None else prompt
        rows = await self._embedder.submit(
            [(before + text,) for text in texts],
            lambda part: self._encode(part, truncate),
            priority=priority,
            whole=not truncate,
        )
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
        rows = await self._scorer.submit(
            pairs,
            lambda part: self._encode(part, truncate),
            priority=priority,
            whole=not truncate,
        )
        return Scores(rows.values[:, 0], rows.tokens, rows.truncated)

    async def close(self) -> None:
        """See ``Engine.close``."""
        await self._embedder.close()
        await self._scorer.close()

    def _encode(
        self, payloads: Sequence[tuple[str, ...]], truncate: bool
    ) -> list[Encoded[tuple[str, ...]]]:
        most = self._settings.max_tokens
        lengths = [sum(len(text.split()) for text in payload) + 2 for payload in payloads]
        long = [place for place, length in enumerate(lengths) if length > most]
        if long and not truncate:
            raise TextsTooLong(indices=long)
        return [
            Encoded(tuple(payload), min(length, most), length > most)
            for payload, length in zip(payloads, lengths, strict=True)
        ]


class NullEngine:
    """Costs next to nothing: rows of one fixed matrix, picked by a checksum of the text.

    It measures what everything around an engine costs. The rows are different and stand in
    clusters, as a model's do, so that an index over them is like a real one.
    """

    def __init__(self, name: str = "null", dimension: int = NULL_DIMENSION) -> None:
        chance = np.random.default_rng(0)
        rows = chance.standard_normal((_NULL_ROWS, dimension), np.float32)
        rows += chance.standard_normal((_NULL_CLUSTERS, dimension), np.float32)[
            np.arange(_NULL_ROWS) % _NULL_CLUSTERS
        ]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        self._rows = rows
        space = Space("0", "mean", True, dimension, "", 1 << 20)
        self.card = ModelCard(
            name=name,
            tasks=("embed",),
            space=space.id,
            dimension=dimension,
            max_tokens=1 << 20,
            dtype="float32",
            engine="null",
        )
        self.device = "cpu"
        self._closed = False
        self._tokens = self._texts = self._steps = 0

    @property
    def stats(self) -> EngineStats:
        """Counters; tokens are characters here."""
        return EngineStats(self._tokens, self._texts, self._steps, 0.0, 0, 0.0)

    async def embed(
        self,
        texts: Sequence[str],
        *,
        priority: Priority,
        prompt: str | None = None,
        truncate: bool = True,
    ) -> Embeddings:
        """See ``Engine.embed``."""
        if self._closed:
            raise Unavailable("the engine is closed")
        lengths = np.fromiter(map(len, texts), np.int32, len(texts))
        self._tokens += int(lengths.sum())
        self._texts += len(texts)
        self._steps += 1
        picked = [crc32(text.encode()) % _NULL_ROWS for text in texts]
        vectors = self._rows[picked]
        return Embeddings(vectors, lengths, np.zeros(len(texts), np.bool_))

    async def rerank(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        priority: Priority,
        instruction: str = "",
        truncate: bool = True,
    ) -> Scores:
        """The engine has no scores to give; its card says so."""
        raise InvalidInput("the null engine does not rerank", field="model")

    async def close(self) -> None:
        """See ``Engine.close``."""
        self._closed = True
