"""The thread that runs the model: where it ends, nobody waits for it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from vecfleet.common.errors import EngineBroken, EngineDied, Unavailable
from vecfleet.worker.engine import Priority
from vecfleet.worker.fake_engine import FakeEngine, FakeSettings
from vecfleet.worker.step_loop import StepLoop

BULK, INTERACTIVE = Priority.BULK, Priority.INTERACTIVE


class Panic(BaseException):
    """As libraries in Rust raise: no ``Exception``."""


@pytest.mark.parametrize("error", [RuntimeError("a fault"), Panic("a fault")])
async def test_all_that_wait_for_a_thread_that_ends_are_told(error):
    reached, gate = threading.Event(), threading.Event()

    def fail(*_) -> None:
        reached.set()
        gate.wait()
        raise error

    engine = await FakeEngine.load(FakeSettings(on_step=fail, step_tokens=64))
    try:
        texts = [f"text {n}" for n in range(300)]
        calls = [asyncio.create_task(engine.embed(texts, priority=BULK))]
        await asyncio.to_thread(reached.wait)
        calls += [asyncio.create_task(engine.embed(["text"], priority=p)) for p in Priority]
        calls.append(asyncio.create_task(engine.embed(texts, priority=BULK)))
        given_up = asyncio.create_task(engine.embed(texts, priority=BULK))
        while engine.stats.pending_tokens < 3 * 4 * 300:
            await asyncio.sleep(0.001)
        calls[0].cancel()  # a step holds its texts
        given_up.cancel()
        gate.set()
        found = await asyncio.gather(*calls, given_up, return_exceptions=True)
        expected = [asyncio.CancelledError, *[EngineDied] * 3, asyncio.CancelledError]
        assert [type(one) for one in found] == expected
        assert engine.stats.state == "broken"
        assert engine.stats.pending_tokens == engine.stats.stalled_s == 0
        for priority in Priority:
            with pytest.raises(EngineBroken, match=type(error).__name__):
                await engine.embed(["text"], priority=priority)
    finally:
        gate.set()
        await engine.close()
    with pytest.raises(Unavailable):
        await engine.embed(["text"], priority=BULK)


async def test_a_load_that_panics_is_told():
    def load():
        raise Panic("a fault")

    loop = StepLoop("loading")
    with pytest.raises(Panic, match="a fault"):
        await loop.start(load)
    await loop.close()
