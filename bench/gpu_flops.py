"""How many floating-point operations a text costs a Qwen3 model; one multiplication and one sum
count as two.

Counted is what the answer needs: the matrices of the layers for each computed token, and causal
attention over the tokens up to each.  Left out are the embedding table, norms and activations,
padding, and tokens that came from a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model costs, from its configuration."""

    matrix_parameters: int  # those that every token is multiplied by, the embeddings left out
    attended_flops: int  # of one token looking at one token, in all layers

    @classmethod
    def of(cls, config: dict[str, Any]) -> Cost:
        """The cost of a Qwen3 by its config.json."""
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        queries = config["num_attention_heads"] * config["head_dim"]
        keys = config["num_key_value_heads"] * config["head_dim"]
        attention = hidden * (queries + 2 * keys) + queries * hidden
        feed_forward = 3 * hidden * config["intermediate_size"]
        # The scores (query by key) and their sum (weight by value) cost two operations a number.
        return cls(layers * (attention + feed_forward), layers * 4 * queries)

    def flops(self, work: Work) -> float:
        """Operations of ``work``."""
        return 2.0 * self.matrix_parameters * work.tokens + self.attended_flops * work.attended


@dataclass(frozen=True, slots=True)
class Work:
    """What a model computed."""

    tokens: int  # padding and cached tokens left out
    attended: float  # pairs of a computed token and one that it looks at

    @classmethod
    def of(cls, lengths: Sequence[int], computed: int | None = None) -> Work:
        """Texts of these lengths, of whose tokens ``computed`` were not in a cache.

        Which text had how many cached is not known: they are taken to be spread evenly.
        """
        total = sum(lengths)
        computed = total if computed is None else min(computed, total)
        attended = float(sum(length * (length + 1) // 2 for length in lengths))
        cached = (total - computed) / max(1, len(lengths))
        return cls(computed, attended - len(lengths) * cached * (cached + 1) / 2)
