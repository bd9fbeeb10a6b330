"""Linear layers with weights laid out once for oneDNN, for bfloat16 on a CPU.

torch lays a layer's weights out again in every call; done once, large products run a tenth faster
and those of a short query twice as fast.  The operators are private to torch, so a model keeps its
own layers where these fail or disagree.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

LAYOUT_FOR_ROWS = 1024

log = logging.getLogger(__name__)


class OneDnnLinear(nn.Module):
    """What ``nn.Linear`` computes, with an activation on the way out."""

    def __init__(self, layer: nn.Linear, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.layout = torch.ops.mkldnn._reorder_linear_weight(
            layer.weight.detach(), LAYOUT_FOR_ROWS
        )
        self.bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, rows: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self.layout, self.bias, self.activation, [], "none"
        )
        return found


class Replaced:
    """The layers that were replaced in a model, to put them back."""

    def __init__(self) -> None:
        self._originals: list[tuple[nn.Module, str, nn.Module]] = []

    def replace(self, parent: nn.Module, name: str, layer: nn.Module) -> None:
        """Put ``layer`` in the place of ``parent``'s child ``name``."""
        self._originals.append((parent, name, getattr(parent, name)))
        setattr(parent, name, layer)

    def undo(self) -> None:
        """Put the original layers back."""
        for parent, name, layer in self._originals:
            setattr(parent, name, layer)
        self._originals.clear()


def use_onednn(model: nn.Module, replaced: Replaced) -> bool:
    """Replace every linear layer of ``model``, with the GELU that follows it where there is one.

    False where this torch has no such operators for this CPU.
    """
    try:
        _replace_layers(model, replaced)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        log.info("linear layers keep torch's layout: %s", error)
        return False
    return True


def _replace_layers(model: nn.Module, replaced: Replaced) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            activation = "none"
            if name == "dense" and _is_gelu(getattr(parent, "intermediate_act_fn", None)):
                activation = "gelu"
                replaced.replace(parent, "intermediate_act_fn", nn.Identity())
            replaced.replace(parent, name, OneDnnLinear(child, activation))


def _is_gelu(activation: object) -> bool:
    return type(activation).__name__ in ("GELUActivation", "GELU")
