"""Random weights in the exact shape of Qwen3-Embedding-0.6B and Qwen3-Reranker-0.6B.

The shapes are those of the published configurations.  The tokenizer is a real one of Qwen's kind,
trained on the texts of the bench, so its ids lie in the beginning of the model's vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from vecfleet.bench.gpu_texts import END_OF_TEXT, IM_END

Role = Literal["embedding", "reranker"]

SPREAD = 0.02  # of the weights, as Qwen3 is initialised
SEED = 7
_RETRIEVAL = "Given a web search query, retrieve relevant passages that answer the query"
_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Qwen3."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    positions: int

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "head_dim": self.head,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": SPREAD,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.positions,
            "max_window_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1_000_000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocabulary,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of its weights."""
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            before = f"model.layers.{layer}"
            yield f"{before}.input_layernorm.weight", (self.hidden,)
            yield f"{before}.self_attn.q_proj.weight", (queries, self.hidden)
            yield f"{before}.self_attn.k_proj.weight", (keys, self.hidden)
            yield f"{before}.self_attn.v_proj.weight", (keys, self.hidden)
            yield f"{before}.self_attn.o_proj.weight", (self.hidden, queries)
            yield f"{before}.self_attn.q_norm.weight", (self.head,)
            yield f"{before}.self_attn.k_norm.weight", (self.head,)
            yield f"{before}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{before}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{before}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{before}.mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)


SHAPES: dict[Role, Shape] = {
    "embedding": Shape(151_669, 1024, 3072, 28, 16, 8, 128, 32_768),
    "reranker": Shape(151_669, 1024, 3072, 28, 16, 8, 128, 40_960),
}
TINY = Shape(8_192, 128, 256, 2, 4, 2, 32, 4_096)  # the same architecture, for a CPU
NAMES: dict[Role, str] = {
    "embedding": "Qwen3-Embedding-0.6B-random",
    "reranker": "Qwen3-Reranker-0.6B-random",
}


def build(folder: Path, role: Role, tokenizer: Tokenizer, shape: Shape, device: str) -> Path:
    """Write a checkpoint below ``folder`` and return its place; the same one each time."""
    place = folder / NAMES[role]
    place.mkdir(parents=True)
    _write(place / "config.json", shape.config())
    save_file(_weights(shape, device), place / "model.safetensors", metadata={"format": "pt"})
    whole: Any = PreTrainedTokenizerFast
    whole(
        tokenizer_object=tokenizer,
        eos_token=IM_END if role == "reranker" else END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=shape.positions,
        padding_side="left",
    ).save_pretrained(place)
    if role == "embedding":
        _write_sentence_transformers(place, shape)
    return place


def _weights(shape: Shape, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(SEED)
    weights = {}
    for name, size in shape.tensors():
        if len(size) == 1:  # a norm
            weights[name] = torch.ones(size, dtype=torch.bfloat16)
            continue
        made = torch.empty(size, dtype=torch.bfloat16, device=device)
        weights[name] = made.normal_(0, SPREAD, generator=generator).cpu()
    return weights


def _write_sentence_transformers(place: Path, shape: Shape) -> None:
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{name}" if number else "",
            "type": f"sentence_transformers.models.{name}",
        }
        for number, name in enumerate(_MODULES)
    ]
    _write(place / "modules.json", modules)
    (place / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": shape.hidden, "pooling_mode_lasttoken": True}
    _write(place / "1_Pooling" / "config.json", pooling)
    prompts = {"query": f"Instruct: {_RETRIEVAL}\nQuery:", "document": ""}
    _write(
        place / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2), "utf-8")
