"""Who dies: rows that a newer version of the same document replaces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from vecfleet.worker.open_segment import OpenSegment
from vecfleet.worker.rows import RowNumbers
from vecfleet.worker.segment import Segment


def losers_within(keys: NDArray[np.uint64], versions: NDArray[np.int64]) -> RowNumbers:
    """Rows that a row of the same key beats: a higher version, or the same one further down.

    ``keys`` is (n, 2), ``versions`` (n,). Sorting one word is enough to see that no key is there
    twice, which is the usual case.
    """
    first = np.sort(keys[:, 0])
    if not (first[1:] == first[:-1]).any():
        return np.empty(0, np.int64)
    order = np.lexsort((versions, keys[:, 1], keys[:, 0]))  # stable: rows stay in their order
    same = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    return np.sort(order[:-1][same])


def deaths_by(
    segment: Segment, number: int, others: Mapping[int, OpenSegment]
) -> dict[int, RowNumbers]:
    """Rows by segment that die because ``segment``, the newest, comes in as ``number``.

    Its own rows die at birth where a higher version is there. The newest wins a tie.
    """
    rows = segment.rows
    losers = losers_within(rows.keys, rows.versions)
    candidates = segment.order.astype(np.int64)  # by key: neighbours in the sorted keys
    if len(losers):
        candidates = candidates[~np.isin(candidates, losers)]
    own: list[RowNumbers] = [losers]
    deaths: dict[int, RowNumbers] = {}
    keys = rows.keys[candidates]
    for other, part in others.items():
        found = part.segment.find(keys, part.liveness.alive)
        hits = np.flatnonzero(found >= 0)
        if len(hits) == 0:
            continue
        theirs = part.segment.rows.versions[found[hits]]
        older = theirs <= rows.versions[candidates[hits]]
        if older.any():
            deaths[other] = np.sort(found[hits[older]])
        own.append(candidates[hits[~older]])
    mine = np.sort(np.concatenate(own))
    if len(mine):
        deaths[number] = mine
    return deaths


def died_since(
    output: OpenSegment, died: Iterable[tuple[int, RowNumbers]], inputs: Mapping[int, OpenSegment]
) -> RowNumbers:
    """Rows of a merge's output that died in its inputs after the merge began.

    Of all rows of an id at most one was alive then, so the key is enough to find it.
    """
    keys = [inputs[number].segment.rows.keys[rows] for number, rows in died]
    if not keys:
        return np.empty(0, np.int64)
    found = output.segment.find(np.concatenate(keys), output.liveness.alive)
    return np.unique(found[found >= 0])
