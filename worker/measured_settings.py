"""What was measured to be good for an engine on this machine, kept in the data folder.

``engine.json`` has an entry for each (weights, device, engine, numbers)::

    {"version": 1, "entries": {"1f0c…/AMD EPYC, 2 cores/torch/bfloat16": {
        "settings": {"max_num_seqs": 32, "max_num_batched_tokens": 2048},
        "model": "package:…", "task": "embed", "goal": "speed",
        "by": "vecfleet bench engine 0.1.0 on build-7", "at": "2026-11-21T09:40:00+00:00"}}}

A worker takes from it what it was not told.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vecfleet.common.errors import ConfigError
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.machine import Machine

FILE = "engine.json"
VERSION = 1
MEASURED_FIELDS = ("max_num_seqs", "max_num_batched_tokens")

_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Measured:
    """Settings that were measured, and where they come from."""

    settings: dict[str, int]  # of ``MEASURED_FIELDS``
    model: str  # as it was named
    task: str  # "embed" or "rerank"
    goal: str  # "speed" or "memory"
    by: str
    at: str  # ISO 8601, UTC


def key_of(fingerprint: str, device: str, engine: str, numbers: str) -> str:
    """The name of an entry, ``device`` and ``numbers`` as the functions below give them."""
    return f"{fingerprint}/{device}/{engine}/{numbers}"


def number_name(dtype: str, quantization: str) -> str:
    """What a model is computed in: "bfloat16", or "int8"."""
    return quantization if quantization in ("int8", "fp8") else dtype


def device_name(device: str, machine: Machine) -> str:
    """What "cpu" or "cuda:1" is here: the GPU's name, or the CPU's with the cores we may use."""
    kind, _, number = device.partition(":")
    if kind != "cpu":
        return machine.gpus[int(number or 0)].name
    return f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def read_measured(folder: Path) -> dict[str, Measured]:
    """All entries of the data folder, none where there is no file; raises ``ConfigError``."""
    path = folder / FILE
    try:
        told = json.loads(path.read_text("utf-8"))
        if told["version"] != VERSION:
            raise ValueError(f"version {told['version']}")
        return {key: _measured(entry) for key, entry in told["entries"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({type(error).__name__}: {error}); remove it, or measure again "
            "with: vecfleet bench engine --apply speed"
        ) from error


def write_measured(folder: Path, key: str, measured: Measured) -> Path:
    """Put an entry beside the others, or in the place of its older one; returns the file."""
    entries = {**read_measured(folder), key: measured}
    content = {"version": VERSION, "entries": {name: asdict(one) for name, one in entries.items()}}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    fresh.replace(path)
    return path


def fill(settings: EngineSettings, measured: Measured) -> tuple[EngineSettings, dict[str, str]]:
    """``settings`` with what was measured where nothing was said, and the reason of each choice.

    A preset says the texts of a step.
    """
    offered = dict(measured.settings)
    if settings.preset is not None:
        offered.pop("max_num_seqs", None)
    filled = settings.filled_from(offered)
    why = f"measured by `{measured.by}` for {measured.goal}, {measured.at[:10]}"
    changed = {name for name in offered if getattr(filled, name) != getattr(settings, name)}
    return filled, dict.fromkeys(sorted(changed), why)


def _measured(entry: Mapping[str, Any]) -> Measured:
    settings = {name: int(value) for name, value in entry["settings"].items()}
    if not settings.keys() <= set(MEASURED_FIELDS) or min(settings.values(), default=1) < 1:
        raise ValueError(f"settings {settings}")
    others = {name: str(entry[name]) for name in ("model", "task", "goal", "by", "at")}
    return Measured(settings, **others)


def _cpu_name() -> str:
    for line in _CPU_INFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "CPU part"):
            return value.strip()
    return "CPU"
