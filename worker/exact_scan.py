"""Exact inner products of many queries with half-precision rows, in numpy.

numpy turns halves into floats one by one (0.6 us a row of 384). Shifting a half's bits to where a
float has its own gives the value times 2**-112, for subnormal halves too; the queries carry the
factor 2**112, so the products come out right and the conversion costs three vector instructions.
Rows must be finite, as those of a segment are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vecfleet.worker.rows import Mask, RowNumbers

Scores = NDArray[np.float32]

BLOCK_ROWS = 4096
_CHUNK_ROWS = 512  # converted at once: stays in the cache
_SHIFT = 13
_SIGN_AND_VALUE = np.int32(-0x70002000)  # 0x8FFFE000: the sign extends into the freed bits
_SCALE = np.float32(2.0**112)


def widen(rows: NDArray[np.float16]) -> Scores:
    """``rows`` as float32."""
    out: Scores = _scaled(rows).view(np.float32)
    out *= _SCALE
    return out


def scan(
    vectors: NDArray[np.float16], queries: Scores, k: int, visible: Mask | None
) -> tuple[Scores, RowNumbers]:
    """The ``k`` best rows of each query by inner product, best first, as (q, k) scores and rows.

    ``queries`` is (q, d); ``visible`` (n,) leaves rows out. Places without a row hold -inf and -1.
    """
    count = len(queries)
    best = np.full((count, k), -np.inf, np.float32)
    rows = np.full((count, k), -1, np.int64)
    scaled = queries * _SCALE
    for start in range(0, len(vectors), BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, len(vectors))
        scores = np.empty((count, end - start), np.float32)
        for low in range(start, end, _CHUNK_ROWS):
            high = min(low + _CHUNK_ROWS, end)
            chunk = _scaled(vectors[low:high]).view(np.float32)
            np.matmul(scaled, chunk.T, out=scores[:, low - start : high - start])
        if visible is not None:
            scores[:, ~visible[start:end]] = -np.inf
        for query in np.flatnonzero((scores > best[:, -1:]).any(axis=1)).tolist():
            fresh = np.flatnonzero(scores[query] > best[query, -1])
            all_scores = np.concatenate([best[query], scores[query, fresh]])
            all_rows = np.concatenate([rows[query], fresh + start])
            best[query], rows[query] = top(all_scores, all_rows, k)
    return best, rows


def top(scores: Scores, rows: RowNumbers, k: int) -> tuple[Scores, RowNumbers]:
    """The ``k`` best of one list, best first; equal scores keep their order."""
    if len(scores) > 4 * k:
        kept = np.sort(np.argpartition(-scores, k)[: k + 1])
        scores, rows = scores[kept], rows[kept]
    order = np.argsort(-scores, kind="stable")[:k]
    return scores[order], rows[order]


def score_rows(vectors: NDArray[np.float16], query: Scores, rows: RowNumbers) -> Scores:
    """Exact scores of some rows for one query, (len(rows),)."""
    scores = np.empty(len(rows), np.float32)
    scaled = query * _SCALE
    for low in range(0, len(rows), _CHUNK_ROWS):
        chunk = _scaled(vectors[rows[low : low + _CHUNK_ROWS]]).view(np.float32)
        np.matmul(chunk, scaled, out=scores[low : low + _CHUNK_ROWS])
    return scores


def score_all(vectors: NDArray[np.float16], query: Scores) -> Scores:
    """Exact scores of all rows for one query, (len(vectors),)."""
    scores = np.empty(len(vectors), np.float32)
    scaled = query * _SCALE
    for low in range(0, len(vectors), _CHUNK_ROWS):
        chunk = _scaled(vectors[low : low + _CHUNK_ROWS]).view(np.float32)
        np.matmul(chunk, scaled, out=scores[low : low + _CHUNK_ROWS])
    return scores


def _scaled(rows: NDArray[np.float16]) -> NDArray[np.int32]:
    bits = rows.view(np.int16).astype(np.int32)
    np.left_shift(bits, _SHIFT, out=bits)
    np.bitwise_and(bits, _SIGN_AND_VALUE, out=bits)
    return bits
