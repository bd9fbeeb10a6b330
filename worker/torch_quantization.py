"""Linear layers with 8-bit weights: int8 on a CPU, fp8 on a GPU.

Weights are rounded once, a scale for each output; rows are rounded as they come, a scale for each
token, so that a result never depends on what else is in a step.  Products are summed exactly (int8)
or in float32 (fp8).  Embedding tables are kept in 16 bits; norms, attention and the head stay as
they are.  The model is compared with itself before and after, on texts, and refused when it changed
too much.

Why no library: torchao's eager layers do the same with the same products, and take two to four
times as long on a CPU; compiled, they take the better part of a minute to start.
``torch.nn.functional.scaled_mm`` is public; ``torch._int_mm`` is not, yet it is what every
library's int8 path calls, and a torch without it is told plainly.  fp8 runs on a CPU too, slowly,
which is how it is tested; on a GPU it has not been measured.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from vecfleet.common.engine_names import Quantization
from vecfleet.common.errors import ConfigError
from vecfleet.worker.memory import give_back_freed
from vecfleet.worker.model_files import ModelFiles
from vecfleet.worker.tokenizer import TextTokenizer, Tokens
from vecfleet.worker.torch_model import TorchModel

KEPT_COSINE = 0.95  # a model that agrees so well with the unquantised one serves as well as it
ACCEPTABLE_COSINE = 0.90  # below, it is another model
INT8_MAX = 127
FP8_MAX = 448  # the largest e4m3
LEAST_SCALE = 1e-12  # of a row that is all zero
MULTIPLE_OF_FP8 = 16  # what the GPU's products ask of a layer's sizes

TRIAL_QUERY = "how long does a bicycle chain last"
TRIAL_TEXTS = (
    "Gravity pulls two bodies towards each other.",
    "Returns the index of the first element that is equal to the value, or -1 where there is none.",
    "Die Bibliothek ist am Sonntag geschlossen.",
    "A chain wears out after 3,000 to 5,000 kilometres; one that is cleaned and oiled lasts longer "
    "and so do the sprockets that it runs on. Measure it: when twelve links have grown by more "
    "than two millimetres, replace it before it takes the cassette with it.",
    "def area(width: float, height: float) -> float: return width * height",
    "The committee met on 14 March 2019 to discuss the budget. It was agreed that spending on "
    "roads would be cut by 4%, that two schools would be rebuilt, and that the question of the "
    "harbour would be put off until the engineers had reported. Three members voted against it.",
    "refund",
    "Patients with a fever above 39 degrees were given 500 mg of paracetamol every six hours.",
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How near a quantised model is to what it was, over the trial texts."""

    cosine_min: float
    cosine_mean: float
    score_difference: float | None = None  # the largest, of a reranker


class Int8Linear(nn.Module):
    """What ``nn.Linear`` computes, from int8 weights and rows."""

    weight: Tensor  # (in, out) int8
    scale: Tensor  # (out,) float32
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight, scale = _scaled(layer.weight.detach().float(), INT8_MAX)
        self.register_buffer("weight", weight.round_().to(torch.int8).t().contiguous())
        self.register_buffer("scale", scale.squeeze(1))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    def forward(self, rows: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        flat, scale = _scaled(rows.flatten(0, -2).float(), INT8_MAX)
        sums = torch._int_mm(flat.round_().to(torch.int8), self.weight)
        found = sums * scale
        if self.bias is None:
            found.mul_(self.scale)
        else:
            torch.addcmul(self.bias, found, self.scale, out=found)
        return found.to(rows.dtype).reshape(*rows.shape[:-1], -1)


class Fp8Linear(nn.Module):
    """What ``nn.Linear`` computes, from 8-bit floats (e4m3)."""

    weight: Tensor  # (out, in)
    scale: Tensor  # (1, out) float32
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight, scale = _scaled(layer.weight.detach().float(), FP8_MAX)
        self.register_buffer("weight", weight.to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale.t().contiguous())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, rows: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        flat, scale = _scaled(rows.flatten(0, -2).float(), FP8_MAX)
        by_row = functional.ScalingType.RowWise
        found: Tensor = functional.scaled_mm(
            flat.to(torch.float8_e4m3fn),
            self.weight.t(),
            scale,
            by_row,
            self.scale,
            by_row,
            output_dtype=torch.bfloat16,
        )
        if self.bias is not None:
            found = found + self.bias
        return found.to(rows.dtype).reshape(*rows.shape[:-1], -1)


class HalfEmbedding(nn.Module):
    """An embedding table that is stored in 16 bits and read in the model's own dtype."""

    weight: Tensor

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.register_buffer("weight", table.weight.detach().bfloat16())
        self._dtype = table.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        """(...) ids to (..., hidden)."""
        return functional.embedding(ids, self.weight).to(self._dtype)


def quantize(
    model: TorchModel, files: ModelFiles, tokenizer: TextTokenizer, kind: Quantization
) -> Agreement:
    """Make the linear layers of ``model`` 8-bit, and compare it with what it was.

    Raises ``ConfigError`` for a model that disagrees with itself, or a torch or a device that does
    not do it.
    """
    trial = trial_inputs(files, tokenizer)
    before = _observe(model, trial, last=files.kind == "qwen3-reranker")
    try:
        _replace(model.base, Int8Linear if kind == "int8" else Fp8Linear)
        after = _observe(model, trial, last=files.kind == "qwen3-reranker")
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"this torch does not compute {kind} on {model.device}: {error}"[:300],
            field="quantization",
        ) from error
    found = _agreement(before, after)
    model.quantized_cosine = found.cosine_min
    _leave_file(model.outer)
    gc.collect()
    give_back_freed()
    judge(files.name, kind, found)
    return found


def judge(name: str, kind: Quantization, found: Agreement) -> None:
    """Log what a quantised model is worth; raises ``ConfigError`` below ``ACCEPTABLE_COSINE``."""
    said = f"{name} in {kind} agrees with itself unquantised by a cosine of {found.cosine_min:.4f}"
    if not found.cosine_min >= ACCEPTABLE_COSINE:
        raise ConfigError(
            f"{said} on its worst trial text; below {ACCEPTABLE_COSINE:.2f} it is another model. "
            "Run it without quantization, or in bf16",
            field="quantization",
        )
    scores = "" if found.score_difference is None else f", scores by {found.score_difference:.3f}"
    text = f"{said} at the least, {found.cosine_mean:.4f} on average{scores}"
    if found.cosine_min < KEPT_COSINE:
        log.warning("%s: acceptable, but compare it on your own texts (vecfleet compare)", text)
    else:
        log.info("%s", text)


def trial_inputs(files: ModelFiles, tokenizer: TextTokenizer) -> list[Tokens]:
    """The trial texts, or their pairs with a query, as the model reads them, by rising length."""
    if files.kind == "embedding":
        texts = [files.document_prompt + text for text in TRIAL_TEXTS]
        encoded = tokenizer.texts(texts, truncate=True)
    else:
        pairs = [(TRIAL_QUERY, text) for text in TRIAL_TEXTS]
        encoded = tokenizer.question_pairs(pairs, kind=files.kind, instruction="", truncate=True)
    return sorted((one.payload for one in encoded), key=lambda payload: len(payload.ids))


@dataclass(frozen=True, slots=True)
class _Observed:
    rows: NDArray[np.float32]  # (n, dimension) vectors, or what a reranker's head reads
    scores: NDArray[np.float32] | None  # (n,) of a reranker


def _observe(model: TorchModel, trial: Sequence[Tokens], *, last: bool) -> _Observed:
    """What the model says to each text, one at a time."""
    states: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        states.append(output.last_hidden_state[0].float().cpu())

    hook = model.base.register_forward_hook(keep)
    try:
        results = [model.run([payload])[0] for payload in trial]
    finally:
        hook.remove()
    if model.width > 1:
        return _Observed(np.stack(results), None)
    places = [len(payload.ids) - 1 if last else 0 for payload in trial]
    read = [state[place].numpy() for state, place in zip(states, places, strict=True)]
    return _Observed(np.stack(read), np.concatenate(results))


def _agreement(before: _Observed, after: _Observed) -> Agreement:
    norms = np.linalg.norm(before.rows, axis=1) * np.linalg.norm(after.rows, axis=1)
    cosines = (before.rows * after.rows).sum(1) / np.maximum(norms, LEAST_SCALE)
    difference = None
    if before.scores is not None and after.scores is not None:
        difference = float(np.abs(before.scores - after.scores).max())
    return Agreement(float(cosines.min()), float(cosines.mean()), difference)


def _replace(base: Any, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace layer by layer, so that no more than one is held twice.

    The pooler of a classifier belongs to its head and stays.
    """
    head = getattr(base, "pooler", None)
    kept = set() if head is None else set(head.modules())
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child not in kept and _fits(child, make):
                setattr(parent, name, make(child))
    table = base.get_input_embeddings()
    if type(table) is nn.Embedding and table.weight.dtype is torch.float32:
        base.set_input_embeddings(HalfEmbedding(table))


def _leave_file(model: nn.Module) -> None:
    """Copy the weights that stayed.

    They may be views of the mapped file, all of which stays in memory while one of them does.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _fits(layer: nn.Linear, make: Callable[[nn.Linear], nn.Module]) -> bool:
    if make is not Fp8Linear:
        return True
    return not (layer.in_features % MULTIPLE_OF_FP8 or layer.out_features % MULTIPLE_OF_FP8)


def _scaled(rows: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Rows (n, d) spread over -largest to largest, and the (n, 1) scales that undo it."""
    scale = rows.abs().amax(1, keepdim=True).div_(largest).clamp_(min=LEAST_SCALE)
    return rows / scale, scale
