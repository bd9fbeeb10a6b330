"""Vectors whose first numbers are a vector by themselves: which models make them, and the cut.

Kusupati et al., "Matryoshka Representation Learning", 2022 (https://arxiv.org/abs/2205.13147): a
model that was trained so gives shorter vectors that keep most of their use; of any other model they
are of no use, so those refuse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vecfleet.common.errors import ConfigError, EngineFailed
from vecfleet.worker.unit_length import not_of_length_1


@dataclass(frozen=True, slots=True)
class Matryoshka:
    """The lengths, shorter than its own, that a model's vectors may be cut to."""

    dimensions: tuple[int, ...] = ()  # rising; empty: any from ``least`` on
    least: int = 1


# Models whose files say nothing of what their cards say. Only such that need no more than the cut:
# nomic-embed-text-v1.5, for one, wants a layer norm before it.
_KNOWN = (
    # "user-defined output dimensions ranging from 32 to 1024" (2560, 4096)
    # https://huggingface.co/Qwen/Qwen3-Embedding-0.6B
    (r"qwen3-embedding-(0\.6b|4b|8b)", Matryoshka(least=32)),
    # "supports Matryoshka Representation Learning and binary quantization"
    # https://huggingface.co/mixedbread-ai/mxbai-embed-large-v1
    (r"mxbai-embed-large-v1", Matryoshka()),
    # MRL with 256 dimensions
    # https://huggingface.co/Snowflake/snowflake-arctic-embed-m-v1.5
    # https://huggingface.co/Snowflake/snowflake-arctic-embed-l-v2.0
    (r"snowflake-arctic-embed-(m-v1\.5|l-v2\.0)", Matryoshka((256,))),
)


def read_matryoshka(
    name: str, path: Path, config: dict[str, Any], sentence: dict[str, Any], dimension: int
) -> Matryoshka | None:
    """What a model of ``dimension`` is trained for; None: for nothing shorter.

    Its config.json says so (``matryoshka_dimensions``, ``is_matryoshka``, as vLLM reads them), the
    few lines above, or sentence-transformers' own file (``truncate_dim``, which the model was saved
    with). Raises ``ConfigError`` where the files say it wrongly.
    """
    if (listed := config.get("matryoshka_dimensions")) is not None:
        shorter = _shorter(name, listed, dimension)
        return Matryoshka(shorter) if shorter else None
    if known := _known(name, path):
        return known
    if config.get("is_matryoshka") is True:
        return Matryoshka()
    if (saved := sentence.get("truncate_dim")) is not None:
        shorter = _shorter(name, [saved], dimension)
        return Matryoshka(shorter) if shorter else None
    return None


def _shorter(name: str, listed: object, dimension: int) -> tuple[int, ...]:
    if not isinstance(listed, list) or not all(type(n) is int and n > 0 for n in listed):
        raise ConfigError(
            f"{name} says that its vectors may be cut to {listed!r}; those must be whole numbers",
            field="model",
        )
    return tuple(sorted({n for n in listed if n < dimension}))


def _known(name: str, path: Path) -> Matryoshka | None:
    # A snapshot in the hub's cache is named by its commit, and the folder above by the model.
    cached = [part.rpartition("--")[2] for part in path.parts if part.startswith("models--")]
    labels = [label.lower() for label in (Path(name).name, *cached)]
    for form, matryoshka in _KNOWN:
        if any(re.fullmatch(form, label) for label in labels):
            return matryoshka
    return None


def shortened(vectors: npt.NDArray[np.float32], dimensions: int) -> npt.NDArray[np.float32]:
    """The first ``dimensions`` numbers of each row, brought to length 1 again.

    Raises ``EngineFailed`` with the places of rows of which next to nothing but zeros is left.
    """
    if dimensions == vectors.shape[1]:
        return vectors
    cut = vectors[:, :dimensions]
    with np.errstate(divide="ignore", invalid="ignore"):
        result: npt.NDArray[np.float32] = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    if empty := not_of_length_1(result):
        raise EngineFailed(f"the first {dimensions} numbers of a vector are zero", indices=empty)
    return result
