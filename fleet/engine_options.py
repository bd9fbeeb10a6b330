"""The options that say which engine a worker runs, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from vecfleet.common.engine_names import DtypeName, EngineName, PresetName, Quantization
from vecfleet.common.settings import Settings

if TYPE_CHECKING:
    from vecfleet.worker.engine_settings import EngineSettings

F = TypeVar("F", bound=Callable[..., Any])

_ENGINES = click.Choice(get_args(EngineName))
_DTYPES = click.Choice(get_args(DtypeName))
_QUANTIZATIONS = click.Choice(get_args(Quantization))
_PRESETS = click.Choice(get_args(PresetName))

ENGINE_FIELDS = (
    "engine",
    "device",
    "dtype",
    "quantization",
    "preset",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "gpu_memory_utilization",
    "tensor_parallel_size",
    "threads",
)


def options(*given: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator for several options, shown in this order."""

    def decorate(function: F) -> F:
        for option in reversed(given):
            function = option(function)
        return function

    return decorate


engine_options = options(
    click.option("--engine", type=_ENGINES, help="What computes; by default vllm on a GPU."),
    click.option("--device", metavar="D", help="auto, cpu, cuda or cuda:N."),
    click.option("--dtype", type=_DTYPES, help="The numbers it computes with."),
    click.option("--quantization", type=_QUANTIZATIONS, help="How small the weights are made."),
    click.option("--preset", type=_PRESETS, help="Lengths and batches under one name."),
    click.option("--max-model-len", type=click.IntRange(1), help="Tokens that texts are cut to."),
    click.option("--max-num-batched-tokens", type=click.IntRange(1), help="Tokens of a step."),
    click.option("--max-num-seqs", type=click.IntRange(1), help="Texts of a step."),
    click.option(
        "--gpu-memory-utilization",
        type=click.FloatRange(0, 1, min_open=True),
        metavar="SHARE",
        help="Share of the GPU's memory to use, 0 to 1.",
    ),
    click.option(
        "--tensor-parallel-size", type=click.IntRange(1), help="GPUs that hold the model together."
    ),
    click.option("--threads", type=click.IntRange(1), help="CPU threads of the engine."),
)


def engine_settings(settings: Settings, *, served_name: str | None = None) -> EngineSettings:
    """What a worker is told about its engine."""
    from vecfleet.worker.engine_settings import EngineSettings

    given = {name: getattr(settings, name) for name in ENGINE_FIELDS}
    return EngineSettings(settings.model, served_name=served_name, data=str(settings.data), **given)


def engine_arguments(settings: Settings) -> list[str]:
    """What was chosen of these, as arguments for a child's command line."""
    arguments: list[str] = []
    for name in ENGINE_FIELDS:
        value, default = getattr(settings, name), Settings.model_fields[name].default
        if value != default:
            arguments += ["--" + name.replace("_", "-"), str(value)]
    return arguments
