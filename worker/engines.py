"""Choosing an engine; each is imported only when it is chosen, for the imports are heavy."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
from typing import cast

from vecfleet.common.engine_names import DtypeName
from vecfleet.worker.engine import Engine
from vecfleet.worker.engine_plan import EnginePlan, make_plan, wanted_length
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.machine import read_machine
from vecfleet.worker.memory import prepare_process
from vecfleet.worker.model_files import ModelFiles, find_model

log = logging.getLogger(__name__)


async def load_engine(settings: EngineSettings) -> Engine:
    """The engine that ``settings`` ask for, ready to work; raises ``ConfigError``."""
    if settings.engine == "fake":
        from vecfleet.worker.fake_engine import FakeEngine, FakeSettings

        return await FakeEngine.load(FakeSettings(name=settings.served_name or settings.model))
    if settings.engine == "null":
        from vecfleet.worker.fake_engine import NullEngine

        return NullEngine(name=settings.served_name or settings.model)
    files = await asyncio.to_thread(
        find_model, settings.model, max_tokens=wanted_length(settings), task=settings.task
    )
    has_vllm = importlib.util.find_spec("vllm") is not None
    plan = make_plan(settings, files, read_machine(), has_vllm=has_vllm)
    for line in plan.lines():
        log.info("%s: %s", files.name, line)
    if plan.engine == "vllm":
        from vecfleet.worker.vllm_engine import VllmEngine

        return await VllmEngine.start(files, plan, settings)
    return await _load_torch(files, plan, settings)


async def _load_torch(files: ModelFiles, plan: EnginePlan, settings: EngineSettings) -> Engine:
    prepare_process()  # before torch is imported
    from vecfleet.worker.torch_engine import TorchEngine
    from vecfleet.worker.torch_loading import TorchSettings

    return await TorchEngine.start(
        files,
        TorchSettings(
            device=plan.device,
            dtype=cast(DtypeName, plan.dtype),
            threads=settings.threads,
            step_tokens=plan.max_num_batched_tokens,
            step_texts=plan.max_num_seqs,
            quantization=plan.quantization,
            memory_share=plan.gpu_memory_utilization,
            served_name=settings.served_name,
            chosen=plan.for_card(),
        ),
    )
