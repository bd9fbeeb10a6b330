"""Whether vectors have the length 1, as all have that are compared with each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_TOLERANCE = 1e-2  # of a length; bfloat16 rounds by 4e-3


def not_of_length_1(vectors: NDArray[np.floating]) -> list[int]:
    """The places of rows (n, d) that have another length, or hold NaN or infinity."""
    squares = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float32)
    # Written so that a NaN, which compares as false, is found too.
    places: list[int] = np.flatnonzero(~(np.abs(squares - 1.0) <= 2 * _TOLERANCE)).tolist()
    return places
