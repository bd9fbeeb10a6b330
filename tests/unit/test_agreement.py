"""Cosines, neighbours, orders, and what they are worth."""

from __future__ import annotations

import numpy as np
import pytest

from vecfleet.fleet.agreement import (
    compare_scores,
    compare_vectors,
    correlation,
    neighbours,
    ranked,
    verdict,
)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def vectors():
    return unit(np.random.default_rng(1).normal(size=(60, 24)))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1.0, "kept"),
        (0.95, "kept"),
        (0.9499, "acceptable"),
        (0.90, "acceptable"),
        (0.8999, "not acceptable"),
        (-1.0, "not acceptable"),
        (float("nan"), "not acceptable"),
    ],
)
def test_verdicts_have_the_limits_of_the_articles(value, said):
    assert verdict(value) == said


def test_the_same_vectors_agree_in_everything(vectors):
    found = compare_vectors(vectors, vectors, queries=20, same_space=True)
    assert found.cosine_mean == pytest.approx(1)
    assert found.cosine_min == pytest.approx(1)
    assert (found.overlap, found.verdict) == (1.0, "kept")


def test_the_mean_decides_and_the_least_is_told(vectors):
    bent = vectors.copy()
    bent[7] = -bent[7]
    found = compare_vectors(vectors, bent, queries=60, same_space=True)
    assert found.cosine_min == pytest.approx(-1)
    assert found.cosine_mean == pytest.approx(1 - 2 / 60)
    assert found.verdict == "kept"
    assert found.overlap < 1


def test_turned_vectors_find_the_same_neighbours_though_their_cosine_is_low(vectors):
    turned = unit(vectors @ np.linalg.qr(np.random.default_rng(2).normal(size=(24, 24)))[0])
    found = compare_vectors(vectors, turned, queries=60, same_space=False)
    assert found.overlap > 0.99
    assert abs(found.cosine_mean) < 0.5
    assert found.verdict is None  # of two models


def test_other_dimensions_have_neighbours_but_no_cosine(vectors):
    found = compare_vectors(vectors, unit(vectors[:, :12]), queries=60, same_space=False)
    assert found.cosine_mean is None and found.cosine_min is None
    assert 0 < found.overlap < 1


def test_neighbours_leave_the_text_itself_out(vectors):
    found = neighbours(vectors, np.arange(60))
    assert found.shape == (60, 10)
    assert not any(place in row for place, row in enumerate(found))
    best = np.argsort(-(vectors @ vectors[3]))[1:11]
    assert found[3].tolist() == best.tolist()
    assert neighbours(vectors[:4], np.array([0])).shape == (1, 3)


def test_scores_of_another_scale_keep_their_order():
    scores = np.random.default_rng(3).random(80, dtype=np.float32)
    found = compare_scores(scores, scores**3, queries=4)
    assert (found.spearman, found.overlap) == (pytest.approx(1), 1.0)
    assert found.pearson < 1
    assert found.verdict == "kept"
    assert found.difference == pytest.approx(np.abs(scores - scores**3).max())


def test_orders_turned_round_do_not_agree():
    scores = np.arange(60, dtype=np.float32)
    found = compare_scores(scores, -scores, queries=2)
    assert found.spearman == pytest.approx(-1)
    assert (found.overlap, found.verdict) == (0.0, "not acceptable")


def test_ranks_share_the_mean_of_equal_values():
    assert ranked(np.array([3.0, 1.0, 3.0, 2.0], np.float32)).tolist() == [2.5, 0.0, 2.5, 1.0]


def test_correlation_of_what_never_changes():
    flat, rising = np.ones(5, np.float32), np.arange(5, dtype=np.float32)
    assert correlation(flat, flat) == 1
    assert correlation(flat, rising) == 0
    assert correlation(rising, 2 * rising + 1) == pytest.approx(1)
