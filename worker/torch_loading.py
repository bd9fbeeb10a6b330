"""Loads a model's files into a ``TorchModel``: device, dtype, head, and the size of its steps."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.utils import logging as transformers_logging

from vecfleet.common.engine_names import DtypeName, Quantization, TaskName
from vecfleet.common.errors import ConfigError
from vecfleet.worker.calls import OnStep
from vecfleet.worker.machine import cpu_has_bf16
from vecfleet.worker.memory import give_back_freed
from vecfleet.worker.model_files import ModelFiles
from vecfleet.worker.prompts import QWEN3_NO, QWEN3_YES
from vecfleet.worker.tokenizer import TextTokenizer
from vecfleet.worker.torch_model import Head, TorchModel, classified, pooled, yes_or_no
from vecfleet.worker.torch_quantization import quantize

MAX_STEP_S = 0.100  # of a trial; real texts and busy cores make it half as long again
CPU_STEP_TOKENS = (256, 512, 1024, 2048, 4096)
GPU_STEP_TOKENS = 16_384
LEAST_GAIN = 0.05  # a larger step must be faster by this much to be worth a query's longer wait
STEP_TRIALS = 3
TYPICAL_LENGTH = 64
# How long a Python thread may keep the step thread waiting. By default 5 ms: a fifth of a GPU's
# step, in which nothing new reaches the GPU.
GPU_THREAD_SWITCH_S = 0.0005

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TorchSettings:
    """How a model is loaded and run."""

    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    dtype: DtypeName = "auto"
    threads: int | None = None  # of the CPU; None: torch's default, its cores
    max_tokens: int | None = None  # the length texts are cut to; None: the model's own
    step_tokens: int | None = None  # tokens of a forward pass; None: measured when loaded
    step_texts: int | None = None  # the most texts of a forward pass; None: no such limit
    quantization: Quantization = "none"
    memory_share: float | None = None  # of the GPU's memory, 0 to 1; None: all that is free
    served_name: str | None = None  # the name in the card; None: the name it was loaded by
    task: TaskName = "auto"
    chosen: Mapping[str, Any] = field(default_factory=dict)  # what the card tells of the plan
    on_step: OnStep | None = None  # called on the step thread before each step


def load_model(files: ModelFiles, tokenizer: TextTokenizer, settings: TorchSettings) -> TorchModel:
    """The model, ready to run; call it on the thread that will run it. Raises ``ConfigError``."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = _device(settings.device)
    if device.type == "cuda":
        sys.setswitchinterval(GPU_THREAD_SWITCH_S)
    if device.type == "cuda" and settings.memory_share is not None:
        torch.cuda.set_per_process_memory_fraction(settings.memory_share, device)
    dtype = _dtype(settings.dtype, device)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model = _build(files, tokenizer, device, dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{files.name} cannot be loaded: {error}"[:500], field="model") from error
    model.step_texts = settings.step_texts
    if settings.quantization in ("int8", "fp8"):
        quantize(model, files, tokenizer, settings.quantization)
    model.choose_way()
    model.step_tokens = settings.step_tokens or _measure_step(model)
    give_back_freed()  # what trials with larger steps left behind
    log.info(
        "%s: %s on %s, %s, steps of %d tokens%s%s",
        files.name,
        str(dtype).removeprefix("torch."),
        device,
        f"packed, {model.kernel} attention" if model.packed else "padded",
        model.step_tokens,
        ", oneDNN layout" if model.onednn else "",
        f", fused {' and '.join(model.fused)}" if model.fused else "",
    )
    return model


def _build(
    files: ModelFiles, tokenizer: TextTokenizer, device: torch.device, dtype: torch.dtype
) -> TorchModel:
    loaders = {
        "embedding": AutoModel,
        "cross-encoder": AutoModelForSequenceClassification,
        "qwen3-reranker": AutoModelForCausalLM,
    }
    whole: Any = loaders[files.kind].from_pretrained(
        files.path,
        dtype=dtype,
        attn_implementation="sdpa",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    whole = whole.to(device).eval().requires_grad_(False)
    base: Any = whole
    outer: Any = None
    width = 1
    if files.kind == "embedding":
        head: Head = pooled(files.pooling)
        width = files.dimension
    elif files.kind == "cross-encoder":
        base, outer = whole.base_model, whole
        if not hasattr(whole, "classifier"):
            raise ConfigError(
                f"{files.name} scores by a head of its own ({type(whole).__name__}), which this "
                "engine does not run; try the vllm engine",
                field="model",
            )
        head = classified(getattr(base, "pooler", None), whole.classifier)
    else:
        base = whole.model
        rows = [_token_id(tokenizer, word) for word in (QWEN3_NO, QWEN3_YES)]
        head = yes_or_no(whole.lm_head.weight[rows].clone())
    return TorchModel(
        base,
        head,
        width=width,
        max_tokens=files.max_tokens,
        pad_id=tokenizer.pad_id,
        reads_types=tokenizer.reads_types,
        whole=outer,
    )


def _token_id(tokenizer: TextTokenizer, word: str) -> int:
    found = tokenizer.token_id(word)
    if found is None:
        raise ConfigError(f"the tokenizer has no token {word!r}", field="model")
    return found


def _device(choice: str) -> torch.device:
    if choice == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(choice)
    except RuntimeError as error:
        raise ConfigError(f"there is no device {choice!r}", field="device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no GPU that torch can use here", field="device")
    return device


def _dtype(choice: DtypeName, device: torch.device) -> torch.dtype:
    if choice != "auto":
        found: torch.dtype = getattr(torch, choice)
        return found
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def _measure_step(model: TorchModel) -> int:
    """Tokens of a step: the fewest that run at nearly full speed in at most ``MAX_STEP_S``.

    A query waits for the step that runs, so a step is not longer than its speed needs.
    """
    if model.device.type != "cpu":
        return GPU_STEP_TOKENS
    chosen, chosen_s = CPU_STEP_TOKENS[0], float("inf")
    for tokens in CPU_STEP_TOKENS:
        took_s = model.time_step(model.trial_step(tokens, TYPICAL_LENGTH), STEP_TRIALS)
        if took_s > MAX_STEP_S:
            break
        if took_s / tokens < (1 - LEAST_GAIN) * chosen_s:
            chosen, chosen_s = tokens, took_s / tokens
        if 2 * took_s > MAX_STEP_S:
            break
    return chosen
