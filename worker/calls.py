"""What every engine's calls share: encoded texts, rows of numbers, and how failures are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from vecfleet.common.errors import EngineFailed, TextsTooLong, VecfleetError
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


def encode_each(encode: Encode[T, P], texts: Sequence[T]) -> list[Encoded[P] | BaseException]:
    """What ``encode`` makes of each text, or what it raises for that text alone.

    So is a panic of the tokeniser, which is written in Rust; it is no ``Exception``.
    Raises errors of our own, as ``TextsTooLong``, which are the whole call's.
    """
    try:
        return list(encode(texts))
    except (VecfleetError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if len(texts) == 1:
            return [error]
    found: list[Encoded[P] | BaseException] = []
    for place, text in enumerate(texts):
        try:
            found += encode_each(encode, [text])
        except TextsTooLong as error:
            raise TextsTooLong(error.message, indices=[place], field=error.field) from error
    return found


def failure_of(failures: Mapping[int, BaseException]) -> EngineFailed | None:
    """The error of a call whose texts at these places failed; None where none did."""
    if not failures:
        return None
    indices = sorted(failures)
    each = [f"the model cannot compute this text: {said(failures[place])}" for place in indices]
    first = said(failures[indices[0]])
    message = f"the model cannot compute {len(indices)} texts, of the first: {first}"
    return EngineFailed(each[0] if len(each) == 1 else message, indices=indices, each=each)


def said(error: BaseException) -> str:
    """An error in a line that is not too long."""
    return f"{type(error).__name__}: {error}"[:_SAID_CHARS]
