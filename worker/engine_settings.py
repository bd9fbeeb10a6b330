"""What a worker is told about its engine; ``engine_plan`` chooses what is left open."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from vecfleet.common.engine_names import (
    DtypeName,
    EngineName,
    PresetName,
    Quantization,
    TaskName,
)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """A model and how to run it; None and "auto" leave the choice to the plan."""

    model: str  # hub id, directory or package:NAME
    engine: EngineName = "auto"
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    dtype: DtypeName = "auto"
    quantization: Quantization = "none"  # fp16 and bf16 are dtypes by another name
    preset: PresetName | None = None
    max_model_len: int | None = None  # tokens that texts are cut to
    max_num_batched_tokens: int | None = None  # tokens of a step
    max_num_seqs: int | None = None  # texts of a step
    gpu_memory_utilization: float | None = None  # share of the GPU's memory, 0 to 1
    tensor_parallel_size: int | None = None  # GPUs that hold the model together
    threads: int | None = None  # of the CPU
    served_name: str | None = None  # how clients name the model, if not as ``model``
    task: TaskName = "auto"
    data: str | None = None  # the folder where measured settings may lie
    least_kv_cache: bool = False  # vLLM keeps little on a GPU too, so that its memory can be told

    def filled_from(self, others: dict[str, Any]) -> EngineSettings:
        """These settings with ``others`` where nothing was said."""
        open_fields = {
            field.name
            for field in fields(self)
            if getattr(self, field.name) == field.default and field.name in others
        }
        return replace(self, **{name: others[name] for name in open_fields})


@dataclass(frozen=True, slots=True)
class Preset:
    """Lengths and batches under one name."""

    max_model_len: int
    max_num_seqs: int


# Cut length and texts a step for rerankers and embedding models of Qwen3's size, as published
# with the first articles on serving them.
PRESETS: dict[PresetName, Preset] = {
    "high_accuracy": Preset(10_000, 8),
    "balanced": Preset(6_000, 16),
    "high_speed": Preset(4_000, 32),
}
