"""Tells an engine that is broken from texts that it cannot compute."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from vecfleet.common.errors import (
    ConfigError,
    EngineBroken,
    EngineDied,
    EngineFailed,
    EngineStarting,
    TextsTooLong,
)
from vecfleet.common.model import ModelCard
from vecfleet.worker.engine import Embeddings, Engine, EngineStats, Priority, Scores
from vecfleet.worker.unit_length import not_of_length_1

log = logging.getLogger(__name__)

PROBE = "Is anybody there?"
PROBE_PAIR = ("no", "no")  # short, as there may be room for few tokens
_Result = TypeVar("_Result")


class ProvenEngine:
    """An ``Engine`` of which each failure is doubted: does it still compute a text of our own?

    If it does, the texts are at fault. If not, as after an error of the GPU that lasts, the engine
    is as good as dead, perhaps of one of the texts that it held: their calls end with
    ``EngineDied``, whose jobs become suspects. From then on the state is "broken", and calls raise
    ``EngineBroken``.
    """

    def __init__(self, engine: Engine) -> None:
        """``engine`` is closed with this one."""
        self._engine = engine
        self._why_broken = ""
        self._held: set[asyncio.Task[Any]] = set()  # those in a call of ours

    @property
    def card(self) -> ModelCard:
        """See ``Engine.card``."""
        return self._engine.card

    @property
    def device(self) -> str:
        """See ``Engine.device``."""
        return self._engine.device

    @property
    def stats(self) -> EngineStats:
        """See ``Engine.stats``."""
        stats = self._engine.stats
        return replace(stats, state="broken") if self._why_broken else stats

    async def embed(
        self,
        texts: Sequence[str],
        *,
        priority: Priority,
        prompt: str | None = None,
        truncate: bool = True,
    ) -> Embeddings:
        """See ``Engine.embed``."""
        call = partial(self._embed, texts, priority=priority, prompt=prompt, truncate=truncate)
        return await self._proven(call)

    async def _embed(self, texts: Sequence[str], **options: Any) -> Embeddings:
        """What the engine makes of ``texts``.

        Raises ``EngineFailed`` with the places of those whose vectors are not of length 1, as zeros
        are, which no index takes and no search finds.
        """
        found = await self._engine.embed(texts, **options)
        if places := not_of_length_1(found.vectors):
            raise EngineFailed("the model gave a vector that is not of length 1", indices=places)
        return found

    async def rerank(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        priority: Priority,
        instruction: str = "",
        truncate: bool = True,
    ) -> Scores:
        """See ``Engine.rerank``."""
        call = partial(
            self._engine.rerank,
            pairs,
            priority=priority,
            instruction=instruction,
            truncate=truncate,
        )
        return await self._proven(call)

    async def close(self) -> None:
        """See ``Engine.close``."""
        await self._engine.close()

    async def prove(self) -> None:
        """Compute a text of our own before anybody's.

        Raises ``EngineFailed`` where that fails or the engine dies of it, ``ConfigError`` where the
        model is told to read so few tokens that there is no room for one.
        """
        try:
            await self._compute_own()
        except TextsTooLong as error:
            message = f"{self.card.name} is to read too few tokens: {error}"
            raise ConfigError(message, field="max_model_len") from error
        except (EngineFailed, EngineDied, EngineBroken, EngineStarting) as error:
            # Unlike a call, this start is not one to be tried again without end.
            message = f"{self.card.name} loads, but fails on a text of our own: {error}"
            raise EngineFailed(message) from error

    async def _proven(self, call: Callable[[], Awaitable[_Result]]) -> _Result:
        if self._why_broken:
            raise EngineBroken(self._why_broken)
        task = asyncio.current_task()
        assert task is not None
        self._held.add(task)
        try:
            return await call()
        except EngineFailed as failure:
            self._held.discard(task)  # it ends by itself
            await self._probe()
            if self._why_broken:
                raise EngineDied(self._why_broken) from failure
            raise
        except asyncio.CancelledError:
            if task in self._held or task.uncancel():
                raise  # somebody else's doing
            raise EngineDied(self._why_broken) from None
        finally:
            self._held.discard(task)

    async def _probe(self) -> None:
        """Whether the engine is broken; all calls that it holds end if so."""
        if self._why_broken:
            return
        try:
            await self._compute_own()
        except EngineFailed as own:  # its message quotes nobody's text, as the callers' may
            if self._why_broken:
                return
            self._why_broken = f"the engine fails on every text: {own}"
            log.error("%s", self._why_broken)
            # Which of them it broke of is not known: none may be given back as if it were innocent.
            held, self._held = self._held, set()
            for task in held:
                task.cancel()

    async def _compute_own(self) -> None:
        if "embed" in self.card.tasks:
            await self._embed([PROBE], priority=Priority.INTERACTIVE)
        else:
            await self._engine.rerank([PROBE_PAIR], priority=Priority.INTERACTIVE)
