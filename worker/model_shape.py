"""How large a model is: what a plan needs to know before any weight is loaded."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from vecfleet.common.errors import ConfigError

_MAX_HEADER_BYTES = 100 << 20  # as the format's own readers allow


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a transformer."""

    parameters: int
    hidden: int
    intermediate: int
    layers: int
    kv_width: int  # heads of keys (or values) times their size
    vocabulary: int
    causal: bool  # a text's tokens see only those before: it can be computed in parts

    def kv_bytes(self, tokens: int, item_bytes: int = 2) -> int:
        """Keys and values of so many tokens, in all layers."""
        return 2 * self.layers * self.kv_width * item_bytes * tokens


def read_shape(path: Path, config: dict[str, Any]) -> ModelShape:
    """The shape of the model in ``path``; raises ``ConfigError`` for a damaged weights file."""
    parameters = 0
    for file in sorted(path.glob("*.safetensors")):
        for tensor in _tensors(file):
            parameters += prod(tensor["shape"])
    heads = int(config.get("num_attention_heads") or 1)
    hidden = int(config.get("hidden_size") or 0)
    head = int(config.get("head_dim") or hidden // heads)
    return ModelShape(
        parameters=parameters,
        hidden=hidden,
        intermediate=int(config.get("intermediate_size") or 4 * hidden),
        layers=int(config.get("num_hidden_layers") or 0),
        kv_width=int(config.get("num_key_value_heads") or heads) * head,
        vocabulary=int(config.get("vocab_size") or 0),
        causal="ForCausalLM" in " ".join(config.get("architectures") or []),
    )


def _tensors(file: Path) -> list[dict[str, Any]]:
    """What the header of a safetensors file lists."""
    try:
        with file.open("rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(source.read(length))
        return [entry for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, struct.error, AttributeError) as error:
        raise ConfigError(f"the weights file {file} is damaged: {error}", field="model") from error
