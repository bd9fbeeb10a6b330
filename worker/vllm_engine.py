"""Embeds and reranks with vLLM, on one GPU or several, or on a CPU.

Texts are tokenised here, in threads, and go to vLLM's process as token ids; vectors come back as
arrays.  vLLM answers a fault in a step with the death of its process.  Calls in flight then fail,
and none is taken until it has been started anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from vecfleet.common.errors import (
    EngineDied,
    TextsTooLong,
    Unavailable,
)
from vecfleet.common.logs import shown
from vecfleet.worker.calls import (
    CHUNK_TEXTS,
    Encode,
    Encoded,
    OnStep,
    Rows,
    encode_each,
    failure_of,
)
from vecfleet.worker.engine import EngineStats, Priority
from vecfleet.worker.engine_counters import EngineCounters
from vecfleet.worker.engine_plan import EnginePlan
from vecfleet.worker.fair_clock import FairClock
from vecfleet.worker.model_files import ModelFiles
from vecfleet.worker.proven_engine import PROBE
from vecfleet.worker.text_engine import TextEngine
from vecfleet.worker.tokenizer import TextTokenizer, Tokens, load_tokenizer
from vecfleet.worker.vllm_core import Asked, CoreDiedError, TextRefusedError, VllmCore
from vecfleet.worker.vllm_keeper import VllmKeeper
from vecfleet.worker.vllm_requests import number_of, request_name

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Text:
    """One text of a call, tokenised."""

    place: int
    tokens: Tokens
    length: int
    done: bool = False


@dataclass(slots=True, eq=False)
class _Call:
    """What one caller waits for."""

    priority: Priority
    rows: Rows
    failures: dict[int, BaseException] = field(default_factory=dict)
    texts: list[_Text] = field(default_factory=list)


class VllmEngine(TextEngine):
    """One model in vLLM; made by ``start``, used on one event loop."""

    def __init__(
        self,
        files: ModelFiles,
        plan: EnginePlan,
        tokenizer: TextTokenizer,
        served_name: str | None,
        on_step: OnStep | None,
    ) -> None:
        super().__init__(files, tokenizer)
        self._clock = FairClock()
        self._counters = EngineCounters(on_step)
        self._encoders = {
            priority: ThreadPoolExecutor(1, thread_name_prefix="vllm-encode")
            for priority in Priority
        }
        self._tasks: set[asyncio.Task[None]] = set()
        self._serial = 0
        self._closed = False
        self._keeper = VllmKeeper(files, plan, self._counters.on_step_end, self._prove)
        self.card = files.card(
            dtype=plan.dtype,
            engine="vllm",
            served_name=served_name,
            quantization=plan.quantization,
            settings=plan.for_card(),
        )
        self.device = plan.device

    @classmethod
    async def start(
        cls,
        files: ModelFiles,
        plan: EnginePlan,
        *,
        served_name: str | None = None,
        on_step: OnStep | None = None,
    ) -> VllmEngine:
        """Load the model: half a minute. Raises ``ConfigError`` and ``EngineFailed``.

        ``on_step(priority, texts)`` is called after each step; a step with both is interactive.
        ``memory.prepare_vllm_process`` is called before this module is imported.
        """
        tokenizer = await asyncio.to_thread(load_tokenizer, files)
        engine = cls(files, plan, tokenizer, served_name, on_step)
        await engine._keeper.start()
        return engine

    @property
    def stats(self) -> EngineStats:
        """See ``Engine.stats``. Busy is the time with texts in flight."""
        keeper = self._keeper
        return replace(
            self._counters.stats(),
            step_tokens=keeper.step_tokens,
            state=keeper.state,
            loading_s=keeper.loading_s,
        )

    async def close(self) -> None:
        """See ``Engine.close``."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for encoder in self._encoders.values():
            encoder.shutdown(wait=False, cancel_futures=True)
        await self._keeper.stop()

    # -- calls ------------------------------------------------------------------------------

    async def _compute(
        self, texts: Sequence[T], encode: Encode[T, Tokens], priority: Priority, *, whole: bool
    ) -> Rows:
        count = len(texts)
        rows = Rows.empty(count, self.card.dimension or 1)
        if self._closed:
            raise Unavailable("the engine is closed")
        if not count:
            return rows
        core = self._keeper.living()
        call = _Call(priority, rows)
        with self._counters.activity.given():
            chunk = count if whole else CHUNK_TEXTS
            await self._finish(call, self._run(core, call, texts, encode, chunk))
        if failure := failure_of(call.failures):
            raise failure
        return rows

    async def _finish(self, call: _Call, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        try:
            await asyncio.shield(task)
        except CoreDiedError:
            raise EngineDied() from None
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if self._closed and not (current and current.cancelling()):
                raise Unavailable("the engine was closed") from None
            # vLLM does not say which texts a step holds. So queries, which are short, are computed
            # though nobody waits, and the call ends once vLLM can die of none of them.
            if call.priority is Priority.BULK:
                task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # it was asked for: nobody is to be told
            raise
        finally:
            self._tasks.discard(task)

    async def _run(
        self,
        core: VllmCore,
        call: _Call,
        texts: Sequence[T],
        encode: Encode[T, Tokens],
        chunk: int,
    ) -> None:
        """Compute a call's texts: tokenise a chunk, let it wait, and tokenise the next."""
        asked: list[tuple[_Text, Asked]] = []
        try:
            for start in range(0, len(texts), chunk):
                new = await self._encode(call, start, texts[start : start + chunk], encode)
                await self._ask(core, call, new, asked)
            await self._collect(core, call, asked)
        except CoreDiedError:
            self._forget(call, asked)
            raise
        except BaseException:
            await core.forget(self._forget(call, asked))
            raise
        finally:
            self._counters.forget(sum(text.length for text in call.texts if not text.done))

    async def _encode(
        self, call: _Call, start: int, texts: Sequence[T], encode: Encode[T, Tokens]
    ) -> list[_Text]:
        encoder = self._encoders[call.priority]

        def watched() -> list[Encoded[Tokens] | BaseException]:
            with self._counters.activity.doing():
                return encode_each(encode, texts)

        try:
            encoded = await asyncio.get_running_loop().run_in_executor(encoder, watched)
        except TextsTooLong as error:
            places = [start + index for index in error.indices]
            raise TextsTooLong(error.message, indices=places, field=error.field) from error
        new = []
        for place, one in enumerate(encoded, start):
            if isinstance(one, BaseException):
                call.failures[place] = one
                continue
            call.rows.tokens[place], call.rows.truncated[place] = one.length, one.truncated
            new.append(_Text(place, one.payload, one.length))
        call.texts += new
        self._counters.wait(sum(text.length for text in new))
        return new

    async def _ask(
        self,
        core: VllmCore,
        call: _Call,
        texts: Sequence[_Text],
        asked: list[tuple[_Text, Asked]],
    ) -> None:
        """Let texts wait in vLLM, adding to ``asked``."""
        total = sum(text.length for text in texts)
        for text in texts:
            self._serial += 1
            if call.priority is Priority.INTERACTIVE:
                number = self._clock.interactive(total)
            else:
                number = self._clock.bulk(text.length)
            try:
                name = request_name(call.priority, number, self._serial)
                one = await core.ask(name, text.tokens, number)
            except TextRefusedError as error:
                self._fail(call, text, error)
                continue
            asked.append((text, one))

    async def _collect(
        self, core: VllmCore, call: _Call, asked: Sequence[tuple[_Text, Asked]]
    ) -> None:
        for text, one in asked:
            row, spared = await core.result(one)
            call.rows.values[text.place] = row
            text.done = True
            self._counters.computed(call.priority, text.length - spared)
            self._counters.forget(text.length)
            self._clock.done(call.priority, number_of(one.request_id), text.length)
            if not np.isfinite(row).all():
                call.failures[text.place] = ArithmeticError("the model returned NaN")

    def _forget(self, call: _Call, asked: Sequence[tuple[_Text, Asked]]) -> list[Asked]:
        """Nobody waits any more for what is not done, which is returned."""
        left = [(text, one) for text, one in asked if not text.done]
        if call.priority is Priority.BULK:
            self._clock.forget_bulk(sum(text.length for text, _ in left))
        return [one for _, one in left]

    def _fail(self, call: _Call, text: _Text, error: Exception) -> None:
        log.warning("vLLM refuses one text: %s", shown(error))
        call.failures[text.place] = error
        text.done = True
        self._counters.forget(text.length)

    async def _prove(self, core: VllmCore) -> None:
        """Compute a text that no caller sent; raises ``EngineFailed`` where that is not right."""
        call = _Call(Priority.INTERACTIVE, Rows.empty(1, self.card.dimension or 1))
        encode = partial(self._tokenizer.texts, truncate=True)
        await self._run(core, call, [PROBE], encode, CHUNK_TEXTS)
        if failure := failure_of(call.failures):
            raise failure
