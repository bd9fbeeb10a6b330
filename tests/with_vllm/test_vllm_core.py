"""What a core of vLLM tells those who wait, with vLLM's own bookkeeping and no process."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from vecfleet.common.errors import EngineFailed
from vecfleet.fleet.cli import exit_code_of

DEADLINE_S = 20.0


class DeadLlm:
    """As vLLM stands right after a death: it knows, and its handler has not told anybody."""

    def __init__(self):
        from vllm.v1.engine.output_processor import OutputProcessor

        self.errored = True
        self.output_processor = OutputProcessor(None, log_stats=False)
        self.output_handler = asyncio.create_task(asyncio.Event().wait())

    def asked(self):
        """A text in flight."""
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.output_processor import RequestOutputCollector

        from vecfleet.worker.vllm_core import Asked

        collector = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, "text")
        self.output_processor.request_states["text"] = SimpleNamespace(queue=collector)
        return Asked("text", collector)

    def shutdown(self):
        """No process to end."""


@pytest.mark.parametrize("is_told_before", [False, True])
async def test_stopping_one_that_died_tells_those_that_its_handler_has_not_told(is_told_before):
    from vllm.v1.engine.exceptions import EngineDeadError

    from vecfleet.worker.vllm_core import CoreDiedError, VllmCore

    llm = DeadLlm()
    asked = llm.asked()
    core = VllmCore(llm, SimpleNamespace(task="embed"), 9)
    waiting = asyncio.create_task(core.result(asked))
    await asyncio.sleep(0)
    if is_told_before:
        llm.output_processor.propagate_error(EngineDeadError())
    await core.stop()
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(CoreDiedError):
            await waiting
    assert llm.output_handler.cancelled()


async def test_a_start_whose_process_ends_has_failed(monkeypatch, tmp_path):
    from vllm.v1.engine.async_llm import AsyncLLM

    from vecfleet.worker import vllm_core

    def end(*_, **__):
        raise RuntimeError("Engine core initialization failed.")

    monkeypatch.setattr(AsyncLLM, "from_engine_args", end)
    monkeypatch.setattr(vllm_core, "engine_arguments", lambda *_: {"model": str(tmp_path)})
    with pytest.raises(EngineFailed, match=r"does not start with m: .*failed") as raised:
        vllm_core.VllmCore.start(SimpleNamespace(name="m"), None, 64, print)
    assert exit_code_of(raised.value) == 1  # counted as a start that failed
