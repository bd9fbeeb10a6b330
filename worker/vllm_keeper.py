"""Keeps a vLLM running: started, started anew after a death, given up when that does not help."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from vecfleet.common.errors import ConfigError, EngineBroken, EngineStarting, Unavailable
from vecfleet.worker.engine import EngineState
from vecfleet.worker.engine_plan import EnginePlan
from vecfleet.worker.model_files import ModelFiles
from vecfleet.worker.vllm_core import CoreDiedError, OnStepEnd, VllmCore

MAX_DEATHS = 8  # in a row, before the worker gives up and is started anew itself
ROW_ENDS_S = 600.0  # one that has lived for so long begins a new row
LEAST_STEP_TOKENS = 256
_LOOK_S = 0.2

log = logging.getLogger(__name__)


class VllmKeeper:
    """One vLLM at a time; used on one event loop.

    After a second death in a row with several texts in flight its steps become half as long with
    each, in case that they need too much memory. A death of one text alone was that text's doing.
    """

    def __init__(
        self,
        files: ModelFiles,
        plan: EnginePlan,
        on_step_end: OnStepEnd,
        prove: Callable[[VllmCore], Awaitable[None]],
    ) -> None:
        """``prove`` computes something.

        It raises ``CoreDiedError`` where vLLM dies of that too, ``EngineFailed`` where it is wrong.
        """
        assert plan.max_num_batched_tokens is not None
        self._planned_tokens = self.step_tokens = plan.max_num_batched_tokens
        self._files = files
        self._plan = plan
        self._on_step_end = on_step_end
        self._prove = prove
        self._core: VllmCore | None = None
        self._watching: asyncio.Task[None] | None = None
        self._loading_since: float | None = None
        self._loaded_at = 0.0
        self._broken: EngineBroken | None = None
        self._deaths = 0  # in a row
        self._crowded_deaths = 0  # in a row, those with several texts in flight

    async def start(self) -> None:
        """Load the model: half a minute; from now on it is watched over.

        Raises as ``VllmCore.start``, and ``ConfigError`` or ``EngineFailed`` where it loads but
        cannot compute, or computes nothing right.
        """
        await self.load()
        try:
            await self._prove(self.living())
        except CoreDiedError as error:
            await self.stop()
            raise ConfigError(
                f"vLLM loads {self._files.name} but cannot run it here; its own messages tell why",
                field="model",
            ) from error
        except BaseException:
            await self.stop()
            raise
        self._watching = asyncio.create_task(self._watch())

    async def load(self) -> None:
        """Start vLLM's process. Raises as ``VllmCore.start``."""
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
        self._loaded_at = time.monotonic()

    def living(self) -> VllmCore:
        """The vLLM that runs, as far as is known.

        Raises ``EngineStarting`` while it is started anew, ``EngineBroken`` once it was given up,
        and ``Unavailable`` after ``stop``.
        """
        if self._broken is not None:
            raise EngineBroken(self._broken.message)
        if self._loading_since is not None or (self._core is not None and self._core.is_dead):
            raise EngineStarting()
        if self._core is None:
            raise Unavailable("the engine is closed")
        return self._core

    @property
    def state(self) -> EngineState:
        """Any thread may ask."""
        if self._broken is not None:
            return "broken"
        core = self._core
        is_ready = self._loading_since is None and core is not None and not core.is_dead
        return "ready" if is_ready else "loading"

    @property
    def loading_s(self) -> float:
        """For how long it has been started anew."""
        since = self._loading_since
        return 0.0 if since is None else time.monotonic() - since

    async def stop(self) -> None:
        """End vLLM's processes."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        core, self._core = self._core, None
        if core is not None:
            await core.stop()

    async def _watch(self) -> None:
        while self._broken is None:
            await asyncio.sleep(_LOOK_S)
            if self._core is not None and self._core.is_dead:
                await self._start_anew(self._core)

    async def _start_anew(self, dead: VllmCore) -> None:
        self._loading_since = time.monotonic()
        try:
            self._note_death(dead.in_flight)
            log.warning("vLLM's process is started anew, steps of %d tokens", self.step_tokens)
            self._core = None
            await dead.stop()
            await self.load()
            assert self._core is not None
            await self._prove(self._core)
        except CoreDiedError:
            self._give_up("vLLM's process dies of every text")
        except EngineBroken as error:
            self._give_up(error.message)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # also a panic of its tokeniser, which is no Exception
            log.error("vLLM does not start again", exc_info=error)
            self._give_up(f"vLLM does not start again: {error}")
        finally:
            self._loading_since = None

    def _note_death(self, texts: int) -> None:
        in_a_row = time.monotonic() - self._loaded_at < ROW_ENDS_S
        self._deaths = self._deaths + 1 if in_a_row else 1
        if self._deaths > MAX_DEATHS:
            raise EngineBroken(f"vLLM's process died {self._deaths} times in a row")
        if texts <= 1:
            self._crowded_deaths, self.step_tokens = 0, self._planned_tokens
            return
        self._crowded_deaths = self._crowded_deaths + 1 if in_a_row else 1
        if self._crowded_deaths > 1:
            least = LEAST_STEP_TOKENS if self._files.computes_in_parts else self._plan.max_model_len
            self.step_tokens = max(least, self.step_tokens // 2)

    def _give_up(self, why: str) -> None:
        self._broken = EngineBroken(why)
        log.error("%s", why)
