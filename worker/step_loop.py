"""Runs a model step by step in a thread of its own, for calls from an event loop.

A call's texts are encoded (tokenised), wait in the batcher, and come back as rows of numbers.  A
small call is encoded by the step thread itself between two steps, which spares a lone query two
thread switches; a larger one in a side thread, a chunk at a time, so that steps begin at once.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

from vecfleet.common.errors import (
    EngineBroken,
    EngineDied,
    EngineFailed,
    TextsTooLong,
    Unavailable,
    VecfleetError,
)
from vecfleet.common.logs import shown
from vecfleet.worker.activity import Activity
from vecfleet.worker.batching import Batch, Batcher, Entry
from vecfleet.worker.calls import (
    CHUNK_TEXTS,
    Encode,
    Encoded,
    OnStep,
    Rows,
    encode_each,
    failure_of,
    said,
)
from vecfleet.worker.engine import EngineStats, Priority
from vecfleet.worker.forward_pass import ForwardPass, Runner
from vecfleet.worker.step_call import StepCall, settle, tell_on

SMALL_CALL_TEXTS = 8
SMALL_CALL_CHARS = 8 << 10
STEP_MEDIAN_OVER = 256

log = logging.getLogger(__name__)

T = TypeVar("T")
P = TypeVar("P")


class StepLoop(Generic[P]):
    """The step thread, the calls in flight, and their counters."""

    def __init__(self, name: str, *, on_step: OnStep | None = None) -> None:
        """``on_step(priority, texts)`` is called on the step thread just before each step."""
        self._name = name
        self._on_step = on_step
        self._changed = threading.Condition()
        self._calls: set[StepCall] = set()
        self._to_encode: list[StepCall] = []
        self._batcher: Batcher[StepCall, P]
        self._runner: Runner[P]
        self._pass: ForwardPass[P]
        self._closing = False
        self._why_broken = ""
        self._thread: threading.Thread | None = None
        self._encoders = {
            priority: ThreadPoolExecutor(1, thread_name_prefix=f"{name}-encode")
            for priority in Priority
        }
        self._running: Batch[StepCall, P] | None = None
        self._encoding: set[StepCall] = set()
        self._leaving: dict[StepCall, asyncio.Future[None]] = {}  # cancelled, but in hand
        self._activity = Activity()
        self._tokens = self._bulk_tokens = self._texts = self._steps = 0
        self._busy_s = 0.0
        self._bulk_steps_s: deque[float] = deque(maxlen=STEP_MEDIAN_OVER)

    async def start(self, load: Callable[[], Runner[P]]) -> None:
        """Load the model on the step thread, which OpenMP ties its threads to; raises its error."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[None] = loop.create_future()

        def main() -> None:
            try:
                self._runner = load()
                self._batcher = self._runner.make_batcher()
                self._pass = ForwardPass(self._runner, self._batcher)
            except BaseException as error:
                tell_on(loop, _settle_start, loaded, error)
                return
            tell_on(loop, _settle_start, loaded, None)
            try:
                self._step_until_closed()
            except BaseException as error:  # nothing may end this thread without a word
                self._break(error)

        self._thread = threading.Thread(target=main, name=f"{self._name}-steps", daemon=True)
        self._thread.start()
        await loaded

    async def submit(
        self, texts: Sequence[T], encode: Encode[T, P], *, priority: Priority, whole: bool = False
    ) -> Rows:
        """The model's rows for ``texts``; with ``whole``, ``encode`` sees all before any runs.

        Errors as in ``Engine.embed``; ``EngineDied``, then ``EngineBroken``, where steps end.
        """
        count = len(texts)
        rows = Rows.empty(count, self._runner.width)
        if self._closing:
            raise Unavailable("the engine is closed")
        if not count:
            return rows
        loop = asyncio.get_running_loop()
        call = StepCall(loop.create_future(), loop, priority, rows, count)
        with self._activity.given():
            self._begin(call, texts, encode, count if whole else CHUNK_TEXTS)
            try:
                return await call.future
            finally:
                if call.future.cancelled():
                    self._forget(call)
                    await self._let_go(call)

    def _begin(self, call: StepCall, texts: Sequence[T], encode: Encode[T, P], chunk: int) -> None:
        if _is_small(texts):
            call.encode_now = partial(encode_each, encode, texts)
        with self._changed:
            if self._why_broken:
                raise EngineBroken(self._why_broken)
            self._calls.add(call)
            if call.encode_now:
                self._to_encode.append(call)
                self._changed.notify()
        if not call.encode_now:
            call.loop.run_in_executor(
                self._encoders[call.priority], self._encode_chunks, call, texts, encode, chunk
            )

    @property
    def stats(self) -> EngineStats:
        """Counters; safe to read from any thread."""
        with self._changed:
            running = self._running.tokens if self._running else 0
            return EngineStats(
                tokens=self._tokens,
                texts=self._texts,
                steps=self._steps,
                busy_s=self._busy_s,
                pending_tokens=self._batcher.pending_tokens + running,
                bulk_step_p50_s=statistics.median(self._bulk_steps_s)
                if self._bulk_steps_s
                else 0.0,
                bulk_tokens=self._bulk_tokens,
                step_tokens=self._batcher.step_tokens,
                stalled_s=self._activity.stalled_s,
                state="broken" if self._why_broken else "ready",
            )

    async def close(self) -> None:
        """Fail what is pending and end the threads; the step that runs is finished first."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        for encoder in self._encoders.values():
            encoder.shutdown(wait=False, cancel_futures=True)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._end_calls(Unavailable("the engine was closed"))

    # -- encoding ---------------------------------------------------------------------------

    def _encode_chunks(
        self, call: StepCall, texts: Sequence[T], encode: Encode[T, P], chunk: int
    ) -> None:
        for start in range(0, len(texts), chunk):
            if self._closing:
                return
            part = texts[start : start + chunk]
            if not self._encode_part(call, start, partial(encode_each, encode, part)):
                return

    def _encode_part(
        self, call: StepCall, start: int, encode: Callable[[], list[Encoded[P] | BaseException]]
    ) -> bool:
        """Whether the call goes on."""
        with self._changed:
            if call not in self._calls:
                return False
            self._encoding.add(call)
        try:
            with self._activity.doing():
                return self._encode(call, start, encode)
        except BaseException as error:  # whatever it is, somebody waits to be told
            log.error("the texts of a call cannot be encoded: %s", shown(error))
            self._fail(call, EngineFailed(f"the texts cannot be encoded: {said(error)}"))
            return False
        finally:
            with self._changed:
                self._encoding.discard(call)
                self._tell_leaving()

    def _encode(
        self, call: StepCall, start: int, encode: Callable[[], list[Encoded[P] | BaseException]]
    ) -> bool:
        try:
            encoded = encode()
        except TextsTooLong as error:
            indices = [start + index for index in error.indices]
            self._fail(call, TextsTooLong(error.message, indices=indices, field=error.field))
            return False
        except VecfleetError as error:
            self._fail(call, error)
            return False
        entries = []
        for place, one in enumerate(encoded, start):
            if isinstance(one, BaseException):
                call.failures[place] = one
                continue
            call.rows.tokens[place] = one.length
            call.rows.truncated[place] = one.truncated
            entries.append(Entry(call, place, one.length, one.payload))
        with self._changed:
            if call not in self._calls:
                return False
            self._batcher.add(call.priority, entries)
            self._changed.notify()
            call.left -= len(encoded) - len(entries)
            is_over = not call.left
        if is_over:
            self._fail(call, failure_of(call.failures) or EngineFailed())
        return not is_over

    # -- the step thread --------------------------------------------------------------------

    def _step_until_closed(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._closing:
                    break
                to_encode, self._to_encode = self._to_encode, []
            for call in to_encode:
                if call.encode_now:
                    self._encode_part(call, 0, call.encode_now)
            with self._changed:
                batch = self._batcher.next_batch()
                self._running = batch
            if batch:
                with self._activity.doing():
                    self._step(batch)
        self._runner.close()

    def _has_work(self) -> bool:
        return bool(self._closing or self._to_encode or self._batcher.pending_tokens)

    def _step(self, batch: Batch[StepCall, P]) -> None:
        if self._on_step:
            self._on_step(batch.priority, len(batch.entries))
        began = time.perf_counter()
        self._pass.run(batch.entries)
        took_s = time.perf_counter() - began
        finished = []
        with self._changed:
            self._running = None
            self._tell_leaving()
            self._batcher.step_tokens = self._pass.step_tokens
            self._steps += 1
            self._tokens += batch.tokens
            self._texts += len(batch.entries)
            self._busy_s += took_s
            if batch.priority is Priority.BULK:
                self._bulk_tokens += batch.tokens
                self._bulk_steps_s.append(took_s)
            for entry in batch.entries:
                call = entry.call
                call.left -= 1
                if not call.left and call in self._calls:
                    self._calls.discard(call)
                    finished.append((call, failure_of(call.failures)))
        for loop in {call.loop for call, _ in finished}:
            tell_on(loop, settle, [done for done in finished if done[0].loop is loop])

    # -- ends of calls ----------------------------------------------------------------------

    def _break(self, error: BaseException) -> None:
        """The step thread ends, and nothing is computed any more."""
        with self._changed:
            self._why_broken = f"the thread that runs the model ended: {shown(error)}"
            self._running = None
            self._tell_leaving()
            for call in self._calls:
                self._batcher.drop(call)
        log.critical("%s", self._why_broken, exc_info=error)
        self._end_calls(EngineDied(self._why_broken))

    def _end_calls(self, error: VecfleetError) -> None:
        with self._changed:
            calls, self._calls = list(self._calls), set()
        for call in calls:
            tell_on(call.loop, settle, [(call, error)])

    def _forget(self, call: StepCall) -> None:
        with self._changed:
            self._calls.discard(call)
            call.encode_now = None
            self._batcher.drop(call)

    async def _let_go(self, call: StepCall) -> None:
        """Wait until neither a step nor an encoder holds any text of the call."""
        with self._changed:
            if not self._is_held(call):
                return
            gone = self._leaving[call] = call.loop.create_future()
        await gone

    def _is_held(self, call: StepCall) -> bool:
        running = self._running.entries if self._running else ()
        return call in self._encoding or any(entry.call is call for entry in running)

    def _tell_leaving(self) -> None:
        for call in [call for call in self._leaving if not self._is_held(call)]:
            tell_on(call.loop, _let, self._leaving.pop(call))

    def _fail(self, call: StepCall, error: VecfleetError) -> None:
        self._forget(call)
        tell_on(call.loop, settle, [(call, error)])


def _is_small(texts: Sequence[Any]) -> bool:
    if len(texts) > SMALL_CALL_TEXTS:
        return False
    return (
        sum(len(t) if isinstance(t, str) else sum(map(len, t)) for t in texts) <= SMALL_CALL_CHARS
    )


def _settle_start(loaded: asyncio.Future[None], error: BaseException | None) -> None:
    if loaded.done():
        return
    if error is None:
        loaded.set_result(None)
    else:
        loaded.set_exception(error)


def _let(gone: asyncio.Future[None]) -> None:
    if not gone.done():
        gone.set_result(None)
