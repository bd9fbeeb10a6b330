"""Searching segments that wait for their index: the signs choose rows, the vectors score them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vecfleet.worker.ann import Found, nearest_codes, rescored
from vecfleet.worker.exact_scan import Scores
from vecfleet.worker.index_policy import SIGNS_FACTOR
from vecfleet.worker.liveness import Liveness
from vecfleet.worker.signs import Codes, sign_codes


def search_by_signs(
    parts: Sequence[tuple[Codes, NDArray[np.float16], Liveness]], queries: Scores, k: int
) -> list[Found]:
    """The ``k`` best visible rows of each part that are among the candidates.

    The candidates are the ``SIGNS_FACTOR * k`` rows of all parts together, and those as near as
    the last of them, so that many small segments cost no more rescoring than a large one.
    A part is its signs, its vectors and who of its rows lives; ``queries`` is (q, d), contiguous.
    """
    wanted = SIGNS_FACTOR * k
    codes = sign_codes(queries)
    near = [
        nearest_codes(signs, codes, min(wanted, len(signs)), liveness)
        for signs, _, liveness in parts
    ]
    distances = np.concatenate([part for part, _ in near], axis=1)
    last = min(wanted, distances.shape[1]) - 1
    limit = np.partition(distances, last, axis=1)[:, last : last + 1]
    return [
        rescored(queries, np.where(own <= limit, rows, -1), vectors, k)
        for (_, vectors, _), (own, rows) in zip(parts, near, strict=True)
    ]
