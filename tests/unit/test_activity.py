"""Since when nothing has got on, and that a worker in which something hangs ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading

import pytest
from servers import eventually

from vecfleet.worker.activity import Activity
from vecfleet.worker.engine import Priority
from vecfleet.worker.fake_engine import FakeEngine, FakeSettings


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nothing_stalls_where_nothing_is_to_do():
    clock = Clock()
    activity = Activity(clock)
    clock.now += 50
    assert activity.stalled_s == 0
    with activity.given():
        clock.now += 3
        assert activity.stalled_s == 3
        activity.got_on()
        clock.now += 1
        with activity.given():
            assert activity.stalled_s == 1
    assert activity.stalled_s == 0


def test_what_is_done_must_end_whatever_goes_on_beside_it():
    clock = Clock()
    activity = Activity(clock)
    with activity.given(), activity.doing():
        for _ in range(5):
            clock.now += 1
            with activity.doing():
                clock.now += 1
        assert activity.stalled_s == 10
    with activity.given():
        clock.now += 2
        assert activity.stalled_s == 2


@pytest.mark.parametrize("texts", [1, 100])  # tokenised by the step thread, and beside it
async def test_a_tokeniser_that_hangs_is_seen_whatever_else_goes_on(texts, monkeypatch):
    hangs = threading.Event()
    encode = FakeEngine._encode

    def hang(self, payloads, truncate):
        if "hang" in payloads[0][0]:
            hangs.wait()
        return encode(self, payloads, truncate)

    monkeypatch.setattr(FakeEngine, "_encode", hang)
    engine = await FakeEngine.load()
    try:
        call = asyncio.create_task(engine.embed(["hang"] * texts, priority=Priority.BULK))

        async def stalls():
            if texts > 1:
                await engine.embed(["a query"], priority=Priority.INTERACTIVE)
            return engine.stats.stalled_s > 0.2

        await eventually(stalls)
        hangs.set()
        await call
        await eventually(lambda: engine.stats.stalled_s == 0)
    finally:
        hangs.set()
        await engine.close()


async def test_a_cancelled_call_ends_when_no_step_holds_its_texts():
    """Until then it may still kill, and must not be forgotten."""
    began, goes_on = threading.Event(), threading.Event()

    def on_step(priority, texts):
        began.set()
        goes_on.wait()

    engine = await FakeEngine.load(FakeSettings(on_step=on_step))
    try:
        call = asyncio.create_task(engine.embed(["a"], priority=Priority.INTERACTIVE))
        await asyncio.to_thread(began.wait)
        waits = asyncio.create_task(engine.embed(["b"], priority=Priority.INTERACTIVE))
        await asyncio.sleep(0)
        for task in (call, waits):
            task.cancel()
        await asyncio.wait([waits])  # no step has it
        assert waits.cancelled() and not call.done()
        assert engine.stats.stalled_s > 0
        goes_on.set()
        await asyncio.wait([call])
        assert call.cancelled()
        await eventually(lambda: engine.stats.stalled_s == 0)
    finally:
        goes_on.set()
        await engine.close()


HANGS = {
    "loop": ("the event loop has done nothing", "time.sleep(60)"),
    "thread": ("the packing has not ended", "await asyncio.to_thread(hang_in, packing)"),
    "load": (
        "the engine has been starting anew",
        "engine.loading_s = 29.5; await asyncio.sleep(60)",
    ),
    "step": ("the engine has done no step", "engine.stalled_s = 5.5; await asyncio.sleep(60)"),
    "end of the loop": (
        "the packing has not ended",
        "asyncio.get_running_loop().run_in_executor(None, hang_in, packing)",
    ),
    "end": ("the packing has not ended", "ThreadPoolExecutor().submit(hang_in, packing)"),
    "nothing": ("went well", "await asyncio.sleep(1); print('went well', file=sys.stderr)"),
}


@pytest.mark.parametrize("what", HANGS)
def test_a_worker_in_which_something_hangs_ends(what):
    says, hang = HANGS[what]
    script = f"""
        import asyncio, logging, sys, time
        from concurrent.futures import ThreadPoolExecutor
        from types import SimpleNamespace
        from vecfleet.worker.activity import Activity
        from vecfleet.worker.progress import ProgressWatch

        class Engine:
            stalled_s = loading_s = 0.0
            stats = property(lambda self: self)

        def hang_in(activity):
            with activity.doing():
                time.sleep(60)

        async def main():
            engine, packing = Engine(), Activity()
            watch = ProgressWatch(
                engine,
                6.0,  # a stall of the whole machine is none of ours
                loop=asyncio.get_running_loop(),
                threads={{"the packing has not ended": packing}},
            )
            watch.start()
            await asyncio.sleep(0.7)  # just before a look: the last one comes well before the end
            {hang}

        logging.basicConfig()
        asyncio.run(main())
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=50
    )
    assert says in ended.stderr
    assert ended.returncode == (0 if what == "nothing" else 1)


@pytest.mark.parametrize("is_told_to_end", [False, True])
def test_a_worker_whose_engine_hangs_on_our_own_text_ends(is_told_to_end):
    """It claims nothing yet, and shows itself to nobody."""
    script = f"""
        import logging, os, signal
        from vecfleet.worker import proven_engine
        from vecfleet.worker.engine_settings import EngineSettings
        from vecfleet.worker.fake_engine import HANG, FakeEngine, FakeSettings
        from vecfleet.worker.main import WorkerConfig, run_worker

        def on_step(*_):
            if {is_told_to_end}:
                os.kill(os.getpid(), signal.SIGTERM)

        async def load(settings):
            return await FakeEngine.load(FakeSettings(on_step=on_step))

        logging.basicConfig()
        proven_engine.PROBE = HANG
        config = WorkerConfig("redis://127.0.0.1:1", EngineSettings("fake"), max_step_s=6.0)
        run_worker(config, load=load)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=50
    )
    assert "the engine has done no step" in ended.stderr
    assert ended.returncode == 1
