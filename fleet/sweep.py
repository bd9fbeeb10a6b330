"""Measures an engine with steps of different sizes, and says which suit best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from vecfleet.common.errors import ConfigError, EngineFailed
from vecfleet.fleet.agreement import correlation
from vecfleet.fleet.engine_probe import Figures, ProbeTask, probe

FAST_ENOUGH = 0.95  # of the best speed: what is within it is as fast, and shorter steps are better
SMALL_ENOUGH_SPEED = 0.80  # of the best speed, for the least memory
SAME_MEMORY = 1.02  # times the least: as small


@dataclass(frozen=True, slots=True)
class Point:
    """An engine with one size of steps."""

    max_num_batched_tokens: int
    max_num_seqs: int
    items_per_s: float  # texts or pairs
    tokens_per_s: float
    step_p50_s: float
    query_p50_s: float  # under bulk
    memory_bytes: int  # of the GPU where there is one, else resident
    efficiency: float = 0.0  # tokens a second ÷ those of the fastest point
    agreement: float = 1.0  # correlation of a reranker's scores with those of the largest steps


@dataclass(frozen=True, slots=True)
class Refused:
    """Steps that the engine does not take, and why."""

    max_num_batched_tokens: int
    max_num_seqs: int
    reason: str


@dataclass(frozen=True, slots=True)
class Sweep:
    """All points of one engine, as they were measured."""

    task: str
    card: dict[str, Any]
    device: str
    points: tuple[Point, ...]
    refused: tuple[Refused, ...] = ()

    def to_wire(self) -> dict[str, Any]:
        """As plain data, with what is recommended."""
        return {
            **asdict(self),
            "recommended": {goal: asdict(choose(self.points, goal)) for goal in GOALS},
        }


GOALS = ("speed", "memory")


def choose(points: Sequence[Point], goal: str) -> Point:
    """The point for "speed" or "memory".

    Speed: of those within 5% of the fastest, the one in which a query waits least. Memory: of those
    with at least 80% of the best speed, the smallest; where several are as small, the fastest.
    """
    best = max(point.tokens_per_s for point in points)
    if goal == "speed":
        fast = [point for point in points if point.tokens_per_s >= FAST_ENOUGH * best]
        return min(fast, key=lambda point: (point.query_p50_s, -point.tokens_per_s))
    fair = [point for point in points if point.tokens_per_s >= SMALL_ENOUGH_SPEED * best]
    least = min(point.memory_bytes for point in fair)
    small = [point for point in fair if point.memory_bytes <= SAME_MEMORY * least]
    return max(small, key=lambda point: point.tokens_per_s)


def judged(points: Sequence[Point], scores: Sequence[Any] | None) -> tuple[Point, ...]:
    """The points with efficiency, and with agreement where there are ``scores`` of each."""
    best = max(point.tokens_per_s for point in points)
    found = [replace(point, efficiency=point.tokens_per_s / best) for point in points]
    if scores is None:
        return tuple(found)
    sizes = [(point.max_num_batched_tokens, point.max_num_seqs) for point in points]
    largest = scores[int(np.lexsort(tuple(zip(*sizes, strict=True))[::-1])[-1])]
    return tuple(
        replace(point, agreement=correlation(one, largest))
        for point, one in zip(found, scores, strict=True)
    )


def run_sweep(
    task: ProbeTask,
    sizes: Sequence[tuple[int, int]],
    on_point: Callable[[Point | Refused], None] | None = None,
) -> Sweep:
    """Measure ``task`` with each (tokens, texts) of a step, one process after the other.

    Raises ``EngineFailed`` where the engine takes none of them.
    """
    points: list[Point] = []
    refused: list[Refused] = []
    values: list[Any] = []
    figures: Figures | None = None
    for tokens, texts in sizes:
        step = {"max_num_batched_tokens": tokens, "max_num_seqs": texts}
        try:
            figures, rows = probe(replace(task, settings={**task.settings, **step}))
        except (ConfigError, EngineFailed) as error:
            refused.append(Refused(tokens, texts, error.message))
            _tell(on_point, refused[-1])
            continue
        points.append(point_of(tokens, texts, figures))
        values.append(rows)
        _tell(on_point, points[-1])
    if figures is None:
        raise EngineFailed(f"no size of steps runs; the last said: {refused[-1].reason}")
    return Sweep(
        task="rerank" if task.pairs else "embed",
        card=figures.card,
        device=figures.device,
        points=judged(points, values if task.pairs else None),
        refused=tuple(refused),
    )


def point_of(tokens: int, texts: int, figures: Figures) -> Point:
    """What was measured with steps of this size."""
    return Point(
        max_num_batched_tokens=tokens,
        max_num_seqs=texts,
        items_per_s=figures.items_per_s,
        tokens_per_s=figures.tokens_per_s,
        step_p50_s=figures.step_p50_s,
        query_p50_s=figures.query_p50_s or figures.step_p50_s,
        memory_bytes=figures.memory_bytes,
    )


def grid(tokens: Sequence[int], texts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each number of tokens with each number of texts, from small to large."""
    for size in sorted(set(tokens)):
        for count in sorted(set(texts)):
            yield size, count


def _tell(on_point: Callable[[Point | Refused], None] | None, found: Point | Refused) -> None:
    if on_point is not None:
        on_point(found)
