"""Medians and quantiles of measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence


def median(values: Iterable[float]) -> float:
    """The value in the middle."""
    return statistics.median(values)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of ``values`` that ``share`` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def rounded(values: Iterable[float], digits: int = 3) -> list[float]:
    """Values as they are told."""
    return [round(value, digits) for value in values]


def microseconds_each(seconds: Mapping[str, float], count: int) -> dict[str, float]:
    """Seconds of several processes for ``count`` documents, as microseconds a document."""
    return {name: round(used / count * 1e6, 2) for name, used in seconds.items()}
