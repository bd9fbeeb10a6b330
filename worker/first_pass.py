"""Searching segments that wait for their index: the signs choose rows, the vectors score them.

On 150,000 vectors of 384 dimensions, mixed from real ones, the candidates hold 0.99 of the ten
nearest rows, in a fifth of the time of a scan.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vecfleet.worker.ann import code_distances, nothing_found
from vecfleet.worker.exact_scan import Scores, score_all, top
from vecfleet.worker.index_policy import signs_candidates
from vecfleet.worker.liveness import Liveness
from vecfleet.worker.rows import RowNumbers
from vecfleet.worker.signs import Codes, sign_codes

SignedPart = tuple[Codes, NDArray[np.float16], Liveness]  # signs, vectors, who of the rows lives


def search_by_signs(
    parts: Sequence[SignedPart], queries: Scores, k: int
) -> tuple[Scores, RowNumbers, RowNumbers]:
    """The ``k`` best visible rows of all parts that are among the candidates.

    As (q, k) scores, best first, places in ``parts`` and rows; -inf, 0 and -1 where there are none.
    The candidates are chosen and scored among all parts together, so that many small segments cost
    little more than a large one. ``queries`` is (q, d), contiguous.
    """
    wanted = signs_candidates(sum(len(signs) for signs, _, _ in parts), k)
    scores, rows = nothing_found(len(queries), k)
    places = np.zeros_like(rows)
    for number, code in enumerate(sign_codes(queries)):
        found = _candidates(parts, code, wanted)
        ends = np.cumsum([len(own) for own in found])
        vectors = np.empty((ends[-1], queries.shape[1]), np.float16)
        for end, own, (_, stored, _) in zip(ends.tolist(), found, parts, strict=True):
            np.take(stored, own, axis=0, out=vectors[end - len(own) : end])
        best, at = top(score_all(vectors, queries[number]), np.arange(ends[-1]), k)
        owners = np.searchsorted(ends, at, side="right")
        scores[number, : len(at)] = best
        places[number, : len(at)] = owners
        rows[number, : len(at)] = np.concatenate(found)[at]
    return scores, places, rows


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
