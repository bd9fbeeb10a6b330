"""How far two engines agree: cosines, neighbours and orders in common, and what that is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

KEPT, ACCEPTABLE = 0.95, 0.90  # of the cosine, or of the correlation of ranks
TOP = 10
LEAST_NORM = 1e-12

Verdict = Literal["kept", "acceptable", "not acceptable"]
Rows = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class VectorAgreement:
    """Of two engines that embedded the same texts."""

    cosine_mean: float | None  # None: their dimensions differ
    cosine_min: float | None
    overlap: float  # mean share of a text's ten nearest that both name, 0 to 1
    same_space: bool  # of the same weights: otherwise a cosine says nothing

    @property
    def verdict(self) -> Verdict | None:
        """By the mean cosine; None for two models, whose vectors are not to be mixed."""
        if not self.same_space or self.cosine_mean is None:
            return None
        return verdict(self.cosine_mean)


@dataclass(frozen=True, slots=True)
class ScoreAgreement:
    """Of two engines that scored the same pairs."""

    pearson: float  # of all scores
    spearman: float  # of the ranks of a query's documents, mean over queries
    overlap: float  # mean share of a query's first ten that both name, 0 to 1
    difference: float  # the largest between two scores

    @property
    def verdict(self) -> Verdict:
        """By the ranks: what is done with scores is ordering by them."""
        return verdict(self.spearman)


def verdict(value: float) -> Verdict:
    """What an agreement is worth; not a number is worth nothing."""
    if value >= KEPT:
        return "kept"
    return "acceptable" if value >= ACCEPTABLE else "not acceptable"


def compare_vectors(a: Rows, b: Rows, *, queries: int, same_space: bool) -> VectorAgreement:
    """``a`` (n, d) and ``b`` (n, e) are unit vectors of the same n texts.

    Up to ``queries`` of the texts, spread over all, are asked for their neighbours.
    """
    mean = least = None
    if a.shape == b.shape:
        cosines = np.einsum("nd,nd->n", a, b)
        mean, least = float(cosines.mean()), float(cosines.min())
    asked = np.unique(np.linspace(0, len(a) - 1, min(queries, len(a))).astype(int))
    pairs = zip(neighbours(a, asked), neighbours(b, asked), strict=True)
    shares = [shared(one, other) for one, other in pairs]
    return VectorAgreement(mean, least, float(np.mean(shares)), same_space)


def neighbours(rows: Rows, asked: NDArray[np.intp]) -> NDArray[np.intp]:
    """(len(asked), k) places of the nearest rows to each, itself left out; k is 10 or fewer."""
    scores = rows[asked] @ rows.T
    scores[np.arange(len(asked)), asked] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, : min(TOP, len(rows) - 1)]


def compare_scores(a: Rows, b: Rows, *, queries: int) -> ScoreAgreement:
    """``a`` and ``b`` (n,) score the documents of ``queries`` queries, as many for each."""
    rows_a, rows_b = a.reshape(queries, -1), b.reshape(queries, -1)
    ranks = [correlation(ranked(x), ranked(y)) for x, y in zip(rows_a, rows_b, strict=True)]
    top = min(TOP, rows_a.shape[1])
    firsts = [
        np.argsort(-rows, axis=1, kind="stable")[:, :top].astype(np.intp)
        for rows in (rows_a, rows_b)
    ]
    shares = [shared(one, other) for one, other in zip(*firsts, strict=True)]
    return ScoreAgreement(
        pearson=correlation(a, b),
        spearman=float(np.mean(ranks)),
        overlap=float(np.mean(shares)),
        difference=float(np.abs(a - b).max()),
    )


def correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Pearson's; 1 for two that are the same throughout, 0 where only one never changes."""
    x, y = a.astype(np.float64) - a.mean(), b.astype(np.float64) - b.mean()
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    if norms < LEAST_NORM:
        return float(np.allclose(x, y, atol=1e-6))
    return float(x @ y / norms)


def ranked(values: Rows) -> NDArray[np.float64]:
    """Ranks from 0 on; equal values share the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    middles: NDArray[np.float64] = ends - (counts + 1) / 2
    return middles[group]


def shared(one: NDArray[np.intp], other: NDArray[np.intp]) -> float:
    """The share of places that both lists name; both are as long."""
    return len(set(one.tolist()) & set(other.tolist())) / max(1, len(one))
