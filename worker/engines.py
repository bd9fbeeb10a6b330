"""Choosing an engine; each is imported only when it is chosen, for the imports are heavy."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import cast

from vecfleet.common.engine_names import DtypeName
from vecfleet.common.errors import ConfigError
from vecfleet.worker.engine import Engine
from vecfleet.worker.engine_plan import EnginePlan, make_plan, wanted_length
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.machine import Machine, read_machine
from vecfleet.worker.measured_settings import device_name, fill, key_of, number_name, read_measured
from vecfleet.worker.memory import prepare_process, prepare_vllm_process
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
    plan = _plan(settings, files, read_machine(), has_vllm=has_vllm)
    for line in plan.lines():
        log.info("%s: %s", files.name, line)
    if plan.engine == "vllm":
        on_cpu = plan.device == "cpu"
        cpu_threads = settings.threads or len(os.sched_getaffinity(0)) if on_cpu else None
        prepare_vllm_process(cpu_threads)  # before vLLM is imported
        from vecfleet.worker.vllm_engine import VllmEngine

        return await VllmEngine.start(files, plan, served_name=settings.served_name)
    return await _load_torch(files, plan, settings)


def _plan(
    settings: EngineSettings, files: ModelFiles, machine: Machine, *, has_vllm: bool
) -> EnginePlan:
    """The plan, with what was measured for this model on this device where nothing was said."""
    plan = make_plan(settings, files, machine, has_vllm=has_vllm)
    known = read_measured(Path(settings.data)) if settings.data else {}
    device = device_name(plan.device, machine)
    numbers = number_name(plan.dtype, plan.quantization)
    if (measured := known.get(key_of(files.fingerprint, device, plan.engine, numbers))) is None:
        return plan
    filled, why = fill(settings, measured)
    try:
        found = make_plan(filled, files, machine, has_vllm=has_vllm)
    except ConfigError as error:
        log.warning("%s: settings %s are not used: %s", files.name, measured.settings, error)
        return plan
    return replace(found, reasons={**found.reasons, **why})


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
