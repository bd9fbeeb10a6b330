"""Fewer, larger kernels for a GPU.

Between a layer's matrix products stand norms, rotations, activations and sums.  As transformers
writes them they are some fifty kernels a layer, each of which reads and writes all of a step's
states: on a fast GPU more time than the products themselves.  Fused they are a handful.

A way is kept where it gives the same results and is faster, so a model whose layers cannot be
compiled, or a machine without a compiler, runs as before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import AttentionInterface

from vecfleet.worker.torch_linear import Replaced
from vecfleet.worker.torch_packing import ATTENTION_NAME, attend

LEAST_GAIN = 0.02  # of a step's time; less is noise

log = logging.getLogger(__name__)

Undo = Callable[[], None]


class FusedRmsNorm(nn.Module):
    """What a model's RMS norm computes, as one kernel."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.epsilon = epsilon

    def forward(self, rows: Tensor) -> Tensor:
        """(..., n) to (..., n)."""
        return rms_norm(rows, self.weight.shape, self.weight, self.epsilon)


def fuse(base: Any, agrees: Callable[[], bool], time_step: Callable[[], float]) -> list[str]:
    """Fuse what stands between the products of ``base``, a transformers model that runs packed.

    ``agrees`` tells whether the model still gives what it should, ``time_step`` the seconds of a
    typical step. Returns the names of the ways that were kept.
    """
    ways: tuple[tuple[str, Callable[[Any], Undo | None]], ...] = (
        ("norms", _fuse_norms),
        ("layers", _compile_layers),
    )
    kept = []
    best_s = time_step()
    for name, way in ways:
        undo = way(base)
        if undo is None:
            continue
        try:
            took_s = time_step() if agrees() else float("inf")
        except Exception as error:  # a compiler may fail in any way it likes
            log.warning("%s stay as they are: %s", name, f"{type(error).__name__}: {error}"[:300])
            took_s = float("inf")
        if took_s <= (1 - LEAST_GAIN) * best_s:
            kept.append(name)
            log.info("fused %s: a step takes %.1f ms, not %.1f", name, took_s * 1e3, best_s * 1e3)
            best_s = took_s
        else:
            undo()
    return kept


def _fuse_norms(base: Any) -> Undo | None:
    """Replace norms of Llama's kind; others, which scale otherwise, do not agree afterwards."""
    replaced = Replaced()
    found = 0
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            epsilon = getattr(child, "variance_epsilon", None)
            if type(child).__name__.endswith("RMSNorm") and epsilon is not None:
                replaced.replace(parent, name, FusedRmsNorm(child.weight, float(epsilon)))
                found += 1
    return replaced.undo if found else None


def _compile_layers(base: Any) -> Undo | None:
    """Compile the layers, one code for all, for rows of any length; takes half a minute."""
    layers = _layers(base)
    if layers is None:
        return None
    # Without this it starts a pool of processes, which outlive the compiling.
    inductor.compile_threads = 1
    # Which texts a step has changes each time: attention stays outside of what is compiled.
    kept_out: Any = torch.compiler.disable
    AttentionInterface.register(ATTENTION_NAME, kept_out(attend))
    for layer in layers:
        layer.compile(dynamic=True)

    def undo() -> None:
        for layer in layers:
            layer._compiled_call_impl = None
        AttentionInterface.register(ATTENTION_NAME, attend)

    return undo


def _layers(base: Any) -> nn.ModuleList | None:
    """The model's stack of equal layers."""
    stacks = [
        module
        for module in base.modules()
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1
    ]
    return max(stacks, key=len, default=None)
