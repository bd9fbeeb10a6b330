import pytest

from vecfleet.common.errors import ConfigError
from vecfleet.worker.index_policy import is_large, must_retrain, plan_index


@pytest.mark.parametrize(
    ("rows", "dimension", "kind", "nlist"),
    [
        (0, 384, "exact", 0),
        (90_000, 384, "exact", 0),
        (100_000, 384, "ivf", 1024),
        (34_000, 1024, "exact", 0),
        (40_000, 1024, "ivf", 1024),
        (400_000, 384, "ivf", 2048),
        (1_000_000, 384, "ivf", 4096),
        (10_000_000, 384, "ivf", 16384),
        (10_000_000_000, 384, "ivf", 65536),
    ],
)
def test_auto_decides_by_work(rows, dimension, kind, nlist):
    plan = plan_index(rows, dimension, "auto")
    assert (plan.kind, plan.nlist) == (kind, nlist)


@pytest.mark.parametrize(
    ("rows", "kind", "nlist"),
    [
        (99_999, "exact", 0),
        (100_000, "ivf", 316),
        (999_999, "ivf", 999),
        (1_000_000, "hnsw", 0),
    ],
)
def test_articles_decides_by_count(rows, kind, nlist):
    plan = plan_index(rows, 384, "articles")
    assert (plan.kind, plan.nlist) == (kind, nlist)


def test_exact_stays_exact():
    assert plan_index(10_000_000, 384, "exact").kind == "exact"


def test_an_unknown_policy_is_refused():
    with pytest.raises(ConfigError):
        plan_index(1, 1, "flat")


def test_large_segments_and_old_templates():
    assert is_large(32_768, 384)
    assert not is_large(8192, 384)
    assert must_retrain(100_000, 400_000)
    assert not must_retrain(100_000, 399_999)
