"""The workers of one machine: one process a (GPU, model, replica), kept running.

Each sees only its GPUs, which is settled in its environment before it imports anything. Those that
share a GPU start one after the other, for an engine measures what is free while it starts; others
start at the same time.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TextIO

import click

from vecfleet.common.errors import ConfigError
from vecfleet.common.settings import Settings, redact_url
from vecfleet.fleet.console import Console
from vecfleet.fleet.engine_options import engine_arguments
from vecfleet.fleet.presence import note_ready
from vecfleet.fleet.process import role_command
from vecfleet.fleet.supervisor import ChildSpec, Supervisor, stop_on_signals
from vecfleet.fleet.worker_plan import (
    Group,
    PlannedModel,
    PlannedWorker,
    choose_gpus,
    gpus_a_model,
    group_gpus,
    plan_pool,
)
from vecfleet.worker.machine import Gpu, read_gpus
from vecfleet.worker.model_size import weight_bytes

MAX_FAILED_STARTS = 5
_EARLY_DRAIN_S = 10.0  # of a worker that loads its model
_LIMITS = ("max_memory_percent", "max_cpu_percent", "resource_check_s")
_POLL_S = 0.1
_PATIENCE_S = 15.0  # between two lines that tell what the start waits for


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """What ``vecfleet worker --gpus`` was told."""

    settings: Settings
    models: tuple[str, ...]
    gpus: str = "all"  # or their numbers, with commas between
    replicas: int = 1  # on each GPU
    served_name: str | None = None  # of the only model
    niceness: int = 10


def sized(model: str, settings: Settings) -> PlannedModel:
    """A model with the size of its weights, as far as it is known here."""
    has_files = settings.engine not in ("fake", "null")
    return PlannedModel(model, weight_bytes(model) if has_files else None)


def group_size(models: Sequence[PlannedModel], gpus: Sequence[Gpu], settings: Settings) -> int:
    """How many GPUs hold a model together: as asked, or as it needs where vLLM can spread it."""
    if settings.tensor_parallel_size is not None:
        return settings.tensor_parallel_size
    can_spread = settings.engine in ("auto", "vllm") and find_spec("vllm") is not None
    return gpus_a_model(models, gpus) if can_spread and gpus else 1


def plan(options: PoolOptions, present: Sequence[Gpu] | None = None) -> list[PlannedWorker]:
    """The workers that ``options`` ask for; raises ``ConfigError`` that says what is wrong."""
    settings = options.settings
    if settings.device != "auto":
        raise ConfigError("--gpus says where workers run; leave --device out")
    if options.served_name is not None and len(options.models) > 1:
        raise ConfigError("--served-name is for one model; several go by their own names")
    if len(set(options.models)) < len(options.models):
        raise ConfigError("a model is named twice; --replicas-per-gpu runs it several times")
    gpus = choose_gpus(options.gpus, read_gpus() if present is None else present)
    models = [sized(model, settings) for model in options.models]
    groups = group_gpus(gpus, group_size(models * options.replicas, gpus, settings))
    return plan_pool(models, groups, options.replicas, settings.gpu_memory_utilization)


def worker_specs(
    plans: Sequence[PlannedWorker],
    settings: Settings,
    redis_url: str,
    *,
    niceness: int,
    served_names: dict[str, str],
) -> list[ChildSpec]:
    """How to run ``plans``: command lines, environments, and who waits for whom."""
    turns: dict[Group, asyncio.Lock] = {}
    specs = []
    for one in plans:
        chosen = settings
        environment = settings.environment(
            redis_url=redis_url, data=str(settings.data), **_limits(settings)
        )
        if one.gpus:
            # By UUID: unlike a number, it means the same GPU to everybody who reads it.
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.uuid for gpu in one.gpus)
            update = {
                "device": "cuda",
                "gpu_memory_utilization": one.memory_share,
                "tensor_parallel_size": len(one.gpus) if len(one.gpus) > 1 else None,
            }
            chosen = settings.model_copy(update=update)
        arguments = ["--model", one.model, "--niceness", str(niceness)]
        if one.model in served_names:
            arguments += ["--served-name", served_names[one.model]]
        arguments += engine_arguments(chosen)
        specs.append(
            ChildSpec(
                one.name,
                # JSON lines, whatever the terminal: the console makes them readable.
                tuple(role_command("--log-format", "json", "worker", *arguments)),
                # Asked to end, not killed: an engine's own processes would be left behind.
                death_signal=signal.SIGTERM,
                early_drain_s=_EARLY_DRAIN_S,
                environment=environment,
                max_failed_starts=MAX_FAILED_STARTS,
                turn=turns.setdefault(one.gpus, asyncio.Lock()) if one.gpus else None,
            )
        )
    return specs


def _limits(settings: Settings) -> dict[str, str]:
    """What was chosen of when a worker pauses."""
    given = {name: getattr(settings, name) for name in _LIMITS}
    defaults = Settings.model_fields
    return {name: str(v) for name, v in given.items() if v != defaults[name].default}


def check_pool(options: PoolOptions) -> int:
    """Print what ``run_pool`` would run; returns the exit code."""
    for one in plan(options):
        click.echo(_told(one))
    url = redact_url(options.settings.find_redis_url())
    click.echo(f"settings and installation are good; Redis at {url}")
    return 0


def run_pool(options: PoolOptions, stream: TextIO | None = None) -> int:
    """Keep the workers running until SIGTERM or Ctrl-C, which drain; returns the exit code.

    Raises ``VecfleetError`` where one of them cannot be kept running.
    """
    console = Console(stream or sys.stderr, options.settings.log_format)
    plans = plan(options)
    if not plans[0].gpus:
        console.say("there is no GPU here that can be used: workers run on the CPU")
    for one in plans:
        console.say(_told(one))
    return asyncio.run(_run(options, plans, console))


def _told(one: PlannedWorker) -> str:
    share = "" if one.memory_share is None else f", {one.memory_share:.1%} of its memory"
    return f"{one.name}: {one.model} on {one.place}{share}"


async def _run(options: PoolOptions, plans: Sequence[PlannedWorker], console: Console) -> int:
    url = options.settings.find_redis_url()

    def on_event(event: str, name: str) -> None:
        if event == "stopping":
            console.say(f"{name} drains")

    supervisor = Supervisor(console.line, on_event)
    stop = stop_on_signals(supervisor.kill)
    named = {} if options.served_name is None else {options.models[0]: options.served_name}
    supervisor.start(
        *worker_specs(plans, options.settings, url, niceness=options.niceness, served_names=named)
    )
    tasks = [
        asyncio.create_task(supervisor.failure()),
        asyncio.create_task(stop.wait()),
        asyncio.create_task(note_ready(supervisor, url)),
        asyncio.create_task(_tell_ready(supervisor, plans, console)),
    ]
    try:
        await asyncio.wait(tasks[:3], return_when=asyncio.FIRST_COMPLETED)
    finally:
        await supervisor.stop()
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks[1:], return_exceptions=True)
    if tasks[0].done():
        raise await supervisor.failure()
    tasks[0].cancel()
    if tasks[2].done() and not tasks[2].cancelled():
        tasks[2].result()  # raises what ended it
    console.say("stopped")
    return 0


async def _tell_ready(
    supervisor: Supervisor, plans: Sequence[PlannedWorker], console: Console
) -> None:
    """Say once that all are ready, and meanwhile what is waited for."""
    began = said = time.monotonic()
    while names := supervisor.not_ready():
        if time.monotonic() - said >= _PATIENCE_S:
            said = time.monotonic()
            console.say(f"still waiting for {', '.join(sorted(names))}")
        await asyncio.sleep(_POLL_S)
    places = ", ".join(f"{one.model} on {one.place}" for one in plans)
    console.say(f"ready after {time.monotonic() - began:.1f} s: {places}")
