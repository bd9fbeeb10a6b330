"""Keeps a vLLM running: started, started again after a death, given up when that does not help."""

from __future__ import annotations

import asyncio
import logging

from vecfleet.common.errors import EngineBroken, Unavailable, VecfleetError
from vecfleet.worker.engine_plan import EnginePlan
from vecfleet.worker.model_files import ModelFiles
from vecfleet.worker.vllm_core import OnStepEnd, VllmCore

MAX_DEATHS = 32  # in a row, before the worker gives up and is started anew itself
LEAST_STEP_TOKENS = 256

log = logging.getLogger(__name__)


class VllmKeeper:
    """One vLLM at a time; used on one event loop.

    After a second death in a row its steps become half as long with each, in case that they need
    too much memory. ``settled`` ends the row.
    """

    def __init__(self, files: ModelFiles, plan: EnginePlan, on_step_end: OnStepEnd) -> None:
        assert plan.max_num_batched_tokens is not None
        self._planned_tokens = self.step_tokens = plan.max_num_batched_tokens
        self._files = files
        self._plan = plan
        self._on_step_end = on_step_end
        self._core: VllmCore | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._broken: EngineBroken | None = None
        self._deaths = 0  # in a row

    async def start(self) -> None:
        """Load the model: half a minute. Raises as ``VllmCore.start``."""
        starting = asyncio.create_task(
            asyncio.to_thread(
                VllmCore.start, self._files, self._plan, self.step_tokens, self._on_step_end
            )
        )
        try:
            self._core = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread goes on whatever we do, and its processes must not be left behind.
            await asyncio.wait([starting])
            if starting.exception() is None:
                await starting.result().stop()
            raise

    def living(self) -> VllmCore:
        """The vLLM that runs, as far as is known.

        Raises ``EngineBroken`` once it was given up, and ``Unavailable`` after ``stop``.
        """
        if self._broken is not None:
            raise self._broken
        if self._core is None:
            raise Unavailable("the engine is closed")
        return self._core

    @property
    def is_restarting(self) -> bool:
        """Whether the model is being loaded anew."""
        return self._restarting is not None

    async def revived(self) -> VllmCore:
        """A vLLM that lives: started anew where it died, for whoever waits, not for one caller.

        Raises as ``living``, and ``EngineBroken`` when it does not start.
        """
        if self.living().is_dead:
            self._note_death()
            await self._restart()
        return self.living()

    async def settled(self, *, explained: bool) -> None:
        """All that was in flight at a death is computed.

        ``explained``: a text was found that vLLM dies of, so the size of steps was not to blame.
        """
        self._deaths = 0
        if explained and self.step_tokens != self._planned_tokens:
            self.step_tokens = self._planned_tokens
            await self._restart()

    def give_up(self, why: str) -> EngineBroken:
        """The error for everybody from now on."""
        self._broken = EngineBroken(why)
        return self._broken

    async def stop(self) -> None:
        """End vLLM's processes."""
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.wait([self._restarting])
        core, self._core = self._core, None
        if core is not None:
            await core.stop()

    def _note_death(self) -> None:
        if self._restarting is not None:
            return
        self._deaths += 1
        if self._deaths > MAX_DEATHS:
            raise self.give_up(f"vLLM's process died {self._deaths} times")
        if self._deaths > 1:
            least = LEAST_STEP_TOKENS if self._files.computes_in_parts else self._plan.max_model_len
            self.step_tokens = max(least, self.step_tokens // 2)

    async def _restart(self) -> None:
        if self._restarting is None:
            self._restarting = asyncio.create_task(self._start_again())
        await asyncio.shield(self._restarting)

    async def _start_again(self) -> None:
        log.warning("vLLM's process is started again, steps of %d tokens", self.step_tokens)
        try:
            await self.living().stop()
            await self.start()
        except VecfleetError as error:
            raise self.give_up(f"vLLM does not start again: {error}") from error
        finally:
            self._restarting = None
