"""Engines under test, each with a gate that holds its steps back.

vLLM takes half a minute to start, so one engine serves all tests of a session, on a loop of its
own; its gate stops and continues vLLM's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from vecfleet.worker.engine import Engine, Priority
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.fake_engine import FakeEngine, FakeSettings, NullEngine

HAS_VLLM = find_spec("vllm") is not None
STEP_TOKENS = 256
MAX_TOKENS = 128
DEADLINE_S = 60


@dataclass
class Gate:
    """Records steps, and holds them back on the step thread while it is shut."""

    steps: list[tuple[Priority, int]] = field(default_factory=list)
    opened: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self):
        self.opened.set()

    def __call__(self, priority: Priority, texts: int) -> None:
        self.steps.append((priority, texts))
        self.reached.set()
        assert self.opened.wait(DEADLINE_S)

    def shut(self) -> None:
        self.steps.clear()
        self.reached.clear()
        self.opened.clear()

    def open(self) -> None:
        self.opened.set()

    async def wait_for_step(self) -> None:
        """Until a step stands at the gate."""
        assert await asyncio.to_thread(self.reached.wait, DEADLINE_S)


class ProcessGate(Gate):
    """Holds back a step by stopping the processes that run it."""

    def __call__(self, priority: Priority, texts: int) -> None:
        self.steps.append((priority, texts))

    def shut(self) -> None:
        self.steps.clear()
        signal_vllm(signal.SIGSTOP)

    def open(self) -> None:
        signal_vllm(signal.SIGCONT)

    async def wait_for_step(self) -> None:
        """Nothing passes: whatever waits, waits in front of its step."""


def vllm_processes(parent: int | None = None) -> list[psutil.Process]:
    """vLLM's processes below ``parent``, by default this one."""
    found = []
    for child in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if child.status() != psutil.STATUS_ZOMBIE and child.name().startswith("VLLM"):
                found.append(child)
    return found


def signal_vllm(number: signal.Signals) -> None:
    """Send each of its processes below this one a signal; some end with the others."""
    for process in vllm_processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


class OwnLoop:
    """An engine that lives on a loop in a thread, called from the loops of tests."""

    def __init__(self, load: Callable[[], Coroutine[Any, Any, Engine]]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.inner = asyncio.run_coroutine_threadsafe(load(), self._loop).result()
        self.card, self.device = self.inner.card, self.inner.device

    @property
    def stats(self):
        return self.inner.stats

    def embed(self, texts, **given) -> Awaitable[Any]:
        return self._call(self.inner.embed(texts, **given))

    def rerank(self, pairs, **given) -> Awaitable[Any]:
        return self._call(self.inner.rerank(pairs, **given))

    async def close(self) -> None:
        await self._call(self.inner.close())

    def end(self) -> None:
        asyncio.run_coroutine_threadsafe(self.inner.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))


async def load_fake(gate: Gate) -> Engine:
    settings = FakeSettings(step_tokens=STEP_TOKENS, max_tokens=MAX_TOKENS, on_step=gate)
    return await FakeEngine.load(settings)


async def load_null(gate: Gate) -> Engine:
    return NullEngine()


async def load_real(kind: str, folder: Path) -> Engine:
    """A real engine in float32, texts cut to the model's own length."""
    if kind == "vllm":
        return await load_vllm(folder, max_model_len=None, max_num_batched_tokens=512)
    from vecfleet.worker.torch_engine import TorchEngine
    from vecfleet.worker.torch_loading import TorchSettings

    settings = TorchSettings(device="cpu", dtype="float32", step_tokens=512)
    return await TorchEngine.load(str(folder), settings)


async def load_torch(folder: Path, gate: Gate | None = None) -> Engine:
    from vecfleet.worker.torch_engine import TorchEngine
    from vecfleet.worker.torch_loading import TorchSettings

    return await TorchEngine.load(
        str(folder),
        TorchSettings(
            device="cpu",
            dtype="float32",
            step_tokens=STEP_TOKENS,
            max_tokens=MAX_TOKENS,
            on_step=gate,
        ),
    )


async def load_vllm(folder: Path | str, gate: Gate | None = None, **given: Any) -> Engine:
    """vLLM on a CPU in float32, with steps and lengths as those of the other engines here."""
    from vecfleet.worker.engine_plan import make_plan
    from vecfleet.worker.machine import read_machine
    from vecfleet.worker.memory import prepare_vllm_process
    from vecfleet.worker.model_files import find_model

    prepare_vllm_process(len(os.sched_getaffinity(0)))
    from vecfleet.worker.vllm_engine import VllmEngine

    lengths = {"max_model_len": MAX_TOKENS, "max_num_batched_tokens": STEP_TOKENS}
    settings = EngineSettings(
        str(folder), engine="vllm", **{"dtype": "float32", "device": "cpu", **lengths, **given}
    )
    files = find_model(settings.model, max_tokens=settings.max_model_len)
    plan = make_plan(settings, files, read_machine(), has_vllm=True)
    return await VllmEngine.start(files, plan, on_step=gate)
