"""Which kind of index a partition deserves, by the work of a search.

policy     rows x dimension            index
auto       up to EXACT_WORK            exact scan of the mapped vectors
           beyond                      IVF, nlist a power of two near 4 sqrt(rows), SQ8, rescored
articles   rows < 100,000              exact
           rows < 1,000,000            IVF, nlist sqrt(rows), SQ8, rescored
           beyond                      HNSW
exact      any                         exact
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vecfleet.common.errors import ConfigError
from vecfleet.worker.partition_state import IndexKind

EXACT_WORK = 35_000_000  # rows x dimension: 90,000 rows of 384, about 3 ms a query
LARGE_WORK = 12_000_000  # a segment below is scanned exactly, whatever the partition's size
SIGNS_WORK = 1_000_000  # a segment below carries no signs: scanning it takes 0.1 ms
SIGNS_FACTOR = 20  # rows that the signs prefer are scored exactly: so many for each hit wanted,
SIGNS_SHARE = 0.01  # and this share of all rows, for signs tell less where rows lie close
SIGNS_MAX_SHARE = 0.05  # where more are wanted, the scan is as fast
RESCORE_FACTOR = 4
RETRAIN_GROWTH = 4
SAMPLE_PER_LIST = 64
ARTICLES_IVF_ROWS = 100_000
ARTICLES_HNSW_ROWS = 1_000_000
MIN_NLIST = 16
MAX_NLIST = 65_536


@dataclass(frozen=True, slots=True)
class IndexPlan:
    """The index that the large segments of a partition should have."""

    kind: IndexKind
    nlist: int = 0  # of an IVF


@dataclass(frozen=True, slots=True)
class IndexRequest:
    """An index to build for one segment."""

    file: str
    kind: IndexKind
    nlist: int
    recall_target: float
    template: str | None  # the file of a trained template; None: train one
    trained_rows: int  # of the partition now; told by a template that is trained
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where one kind of index follows another; tests make them small."""

    exact_work: int = EXACT_WORK
    large_work: int = LARGE_WORK
    articles_ivf_rows: int = ARTICLES_IVF_ROWS
    articles_hnsw_rows: int = ARTICLES_HNSW_ROWS


DEFAULT_THRESHOLDS = Thresholds()


def plan_index(
    rows: int, dimension: int, policy: str, limits: Thresholds = DEFAULT_THRESHOLDS
) -> IndexPlan:
    """The plan for a partition of ``rows`` living documents; raises ``ConfigError``."""
    if policy == "exact":
        return IndexPlan("exact")
    if policy == "auto":
        if rows * dimension <= limits.exact_work:
            return IndexPlan("exact")
        nlist = 2 ** round(math.log2(4 * math.sqrt(rows)))
        return IndexPlan("ivf", min(max(nlist, MIN_NLIST), MAX_NLIST))
    if policy == "articles":
        if rows < limits.articles_ivf_rows:
            return IndexPlan("exact")
        if rows < limits.articles_hnsw_rows:
            return IndexPlan("ivf", min(max(math.isqrt(rows), MIN_NLIST), MAX_NLIST))
        return IndexPlan("hnsw")
    raise ConfigError(f"{policy} is not an index policy (auto, articles, exact)")


def is_large(rows: int, dimension: int, limits: Thresholds = DEFAULT_THRESHOLDS) -> bool:
    """Whether a segment of ``rows`` rows gets an index of its own."""
    return rows * dimension >= limits.large_work


def signs_candidates(rows: int, k: int) -> int:
    """How many of ``rows`` rows without an index are scored for ``k`` hits; 0: scan them all."""
    wanted = SIGNS_FACTOR * k + int(SIGNS_SHARE * rows)
    return wanted if wanted <= SIGNS_MAX_SHARE * rows else 0


def must_retrain(trained_rows: int, rows: int) -> bool:
    """Whether a template has grown old."""
    return rows >= RETRAIN_GROWTH * trained_rows


def sample_rows(nlist: int) -> int:
    """How many vectors to train an IVF of ``nlist`` lists on."""
    return SAMPLE_PER_LIST * nlist
