"""The seam between the queue and a model: what every engine offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from vecfleet.common.model import ModelCard

EngineState = Literal["ready", "loading", "broken"]


class Priority(IntEnum):
    """Lower runs first; bulk still keeps a tenth of the tokens."""

    INTERACTIVE = 0
    BULK = 1


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of n texts, in the order of the texts."""

    vectors: npt.NDArray[np.float32]  # (n, dimension), L2-normalised
    tokens: npt.NDArray[np.int32]  # (n,) tokens computed for each text, after the cut
    truncated: npt.NDArray[np.bool_]  # (n,) whether the text was cut to the model's length


@dataclass(frozen=True, slots=True)
class Scores:
    """Relevance of n (query, document) pairs, in the order of the pairs."""

    scores: npt.NDArray[np.float32]  # (n,) in [0, 1]
    tokens: npt.NDArray[np.int32]  # (n,)
    truncated: npt.NDArray[np.bool_]  # (n,)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since the engine started; the worker publishes their rates."""

    tokens: int  # tokens computed, padding left out
    texts: int
    steps: int  # forward passes
    busy_s: float  # time spent in forward passes
    pending_tokens: int  # waiting or in the running step
    bulk_step_p50_s: float  # median of the last 256 bulk forward passes, 0.0 before the first
    bulk_tokens: int = 0  # those of ``tokens`` that were computed for bulk
    step_tokens: int = 0  # what a forward pass of several texts takes at most; 0: it has none
    stalled_s: float = 0.0  # for how long something that was given to it has not got on
    state: EngineState = "ready"  # else its process died, and it takes no calls
    loading_s: float = 0.0  # for how long it has been started anew


class Engine(Protocol):
    """One model on one device. Calls may overlap: the engine batches across them."""

    @property
    def card(self) -> ModelCard:
        """The model's name, tasks, space and limits."""
        ...

    @property
    def device(self) -> str:
        """Where the model is: "cpu", "cuda:0"."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Counters; cheap, and safe to read from any thread."""
        ...

    async def embed(
        self,
        texts: Sequence[str],
        *,
        priority: Priority,
        prompt: str | None = None,
        truncate: bool = True,
    ) -> Embeddings:
        """Embed ``texts``, each with ``prompt`` put before it.

        ``prompt`` None stands for the prompt of the model's documents, which its space pins; most
        models have none.  Cancelling the call drops the texts that no forward pass has taken yet,
        and ends once none holds any of them: the process may still die of one.
        Raises ``TextsTooLong`` when ``truncate`` is false and a text is too long, ``EngineFailed``
        when the model fails on some of these texts (both carry ``indices``), ``EngineDied`` when
        the engine's own process dies meanwhile, ``EngineStarting`` until it is back, and
        ``Unavailable`` once the engine is closed.
        """
        ...

    async def rerank(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        priority: Priority,
        instruction: str = "",
        truncate: bool = True,
    ) -> Scores:
        """Score (query, document) pairs; ``instruction`` is read by models that take one.

        A document that is too long is cut, the query never.  Errors as in ``embed``, and
        ``TextsTooLong`` where a query leaves no room for its document.
        """
        ...

    async def close(self) -> None:
        """Fail what is pending, free the model, and stop the engine's threads and processes."""
        ...
