"""What a model is to the fleet: its space, and the card a worker announces for it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Task = Literal["embed", "rerank"]
RerankMethod = Literal["cross-encoder", "qwen3", "cosine"]


@dataclass(frozen=True, slots=True)
class Space:
    """What makes two vectors comparable; a collection pins it.

    dtype, engine and quantisation are left out on purpose: they change a vector by rounding only,
    and a worker shows with canary texts that its vectors agree.
    """

    weights: str  # fingerprint of the weights and the tokenizer, hex
    pooling: str  # "mean", "cls" or "last"
    normalized: bool
    dimension: int
    prompt: str  # put before every document's text
    max_tokens: int  # the length texts are cut to

    @property
    def id(self) -> str:
        """16 hex digits; part of queue names, so that no block reaches other weights."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a worker tells the fleet about the model it holds."""

    name: str  # as people name it: a hub id, a directory's name, or package:NAME
    tasks: tuple[Task, ...]
    space: str  # Space.id of the embeddings; for a reranker, its weights' id in the same form
    dimension: int  # 0 for a model that cannot embed
    max_tokens: int
    dtype: str
    engine: str  # "torch", "vllm", "fake", "null"
    rerank_method: RerankMethod | None = None
    prompts: dict[str, str] = field(default_factory=dict)  # name -> text put before the input
    pooling: str = ""
    quantization: str = "none"
    settings: dict[str, str | int | float] = field(default_factory=dict)  # what was chosen for it

    def to_wire(self) -> dict[str, Any]:
        """The card as plain data."""
        return {**asdict(self), "tasks": list(self.tasks)}

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> ModelCard:
        """The card that ``to_wire`` wrote; fields a newer worker added are ignored."""
        known = {name: wire[name] for name in cls.__dataclass_fields__ if name in wire}
        return cls(**{**known, "tasks": tuple(wire["tasks"])})
