"""Searching segments that wait for their index: the signs choose rows, the vectors score them.

On 150,000 vectors of 384 dimensions, mixed from real ones, the candidates hold 0.99 of the ten
nearest rows, in a fifth of the time of a scan.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vecfleet.worker.ann import Found, code_distances, nothing_found, rescored
from vecfleet.worker.exact_scan import Scores
from vecfleet.worker.index_policy import signs_candidates
from vecfleet.worker.liveness import Liveness
from vecfleet.worker.rows import RowNumbers
from vecfleet.worker.signs import Codes, sign_codes

SignedPart = tuple[Codes, NDArray[np.float16], Liveness]  # signs, vectors, who of the rows lives


def search_by_signs(parts: Sequence[SignedPart], queries: Scores, k: int) -> list[Found]:
    """The ``k`` best visible rows of each part that are among the candidates.

    The candidates are chosen among all parts together, so that many small segments cost no more
    rescoring than a large one. ``queries`` is (q, d), contiguous.
    """
    wanted = signs_candidates(sum(len(signs) for signs, _, _ in parts), k)
    found = [nothing_found(len(queries), k) for _ in parts]
    for number, code in enumerate(sign_codes(queries)):
        query = queries[number : number + 1]
        for place, rows in enumerate(_candidates(parts, code, wanted)):
            scores, best = rescored(query, [rows], parts[place][1], k)
            found[place][0][number], found[place][1][number] = scores[0], best[0]
    return found


def _candidates(parts: Sequence[SignedPart], code: Codes, wanted: int) -> list[RowNumbers]:
    """The ``wanted`` visible rows nearest to ``code`` and those as near as the last of them."""
    beyond = 8 * len(code) + 1
    counts = np.zeros(beyond + 1, np.int64)
    distances = []
    for signs, _, liveness in parts:
        own = code_distances(signs, code)
        if not liveness.all_visible:
            np.putmask(own, ~liveness.visible, beyond)
        counts += np.bincount(own, minlength=beyond + 1)
        distances.append(own)
    limit = min(int(np.searchsorted(np.cumsum(counts), wanted)), beyond - 1)
    return [np.flatnonzero(own <= limit) for own in distances]
