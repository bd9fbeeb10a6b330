"""What every engine's calls share: encoded texts, rows of numbers, and how failures are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from vecfleet.common.errors import EngineFailed
from vecfleet.worker.engine import Priority

CHUNK_TEXTS = 128  # of a call are encoded at a time, so that steps begin at once
_SAID_CHARS = 300

T = TypeVar("T")
P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Encoded(Generic[P]):
    """One text as the model reads it."""

    payload: P
    length: int  # tokens, after the cut
    truncated: bool


@dataclass(frozen=True, slots=True)
class Rows:
    """What the model said about n texts, in their order."""

    values: NDArray[np.float32]  # (n, width)
    tokens: NDArray[np.int32]  # (n,)
    truncated: NDArray[np.bool_]  # (n,)

    @classmethod
    def empty(cls, count: int, width: int) -> Rows:
        """Rows to be filled in; their values are anything."""
        return cls(
            np.empty((count, width), np.float32), np.zeros(count, np.int32), np.zeros(count, bool)
        )


Encode = Callable[[Sequence[T]], list[Encoded[P]]]
OnStep = Callable[[Priority, int], None]


def failure_of(failures: Mapping[int, Exception]) -> EngineFailed | None:
    """The error of a call whose texts at these places failed; None where none did."""
    if not failures:
        return None
    indices = sorted(failures)
    first = said(failures[indices[0]])
    which = "this text" if len(indices) == 1 else f"{len(indices)} texts"
    return EngineFailed(f"the model cannot compute {which}: {first}", indices=indices)


def said(error: Exception) -> str:
    """An error in a line that is not too long."""
    return f"{type(error).__name__}: {error}"[:_SAID_CHARS]
