"""Draws a sweep: throughput, latency, memory, and efficiency or agreement. Alone in matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from vecfleet.fleet.sweep import Point, Sweep, choose

SIZE_INCHES = (12, 8.5)
DPI = 110
MIB = 1 << 20
_COLOURS = "viridis"
_MARKS = {"speed": ("*", 260, "tab:red"), "memory": ("D", 80, "tab:blue")}

Value = Callable[[Point], float]


def draw(sweep: Sweep, path: Path) -> None:
    """Write a PNG: tokens of a step along, a line for each number of texts."""
    items = "documents" if sweep.task == "embed" else "pairs"
    where = "GPU memory" if sweep.device != "cpu" else "resident memory"
    panels: list[tuple[str, str, Value]] = [
        (f"Throughput ({items}/s, more is better)", f"{items} a second", lambda p: p.items_per_s),
        (
            "A query's p50 while bulk runs (ms, less is better)",
            "milliseconds",
            lambda p: p.query_p50_s * 1000,
        ),
        (f"Memory ({where}, less is better)", "MiB", lambda p: p.memory_bytes / MIB),
    ]
    if sweep.task == "rerank":
        title = "Agreement of scores with those of the largest steps (1 is the same)"
        panels.append((title, "Pearson's correlation", lambda p: p.agreement))
    else:
        title = "Efficiency (tokens/s ÷ those of the fastest, more is better)"
        panels.append((title, "share of the best", lambda p: p.efficiency))
    figure, axes = plt.subplots(
        2, 2, figsize=SIZE_INCHES, layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)
    )
    figure.suptitle(_heading(sweep), fontsize=13)
    for axis, (title, unit, value) in zip(axes.flat, panels, strict=True):
        _draw_panel(axis, sweep, title, unit, value)
    for axis in axes.flat[:2]:
        axis.set_ylim(bottom=0)
    axes.flat[3].set_ylim(*_share_limits([panels[3][2](p) for p in sweep.points]))
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(7, len(labels)))
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _heading(sweep: Sweep) -> str:
    card = sweep.card
    weights = "" if card["quantization"] == "none" else f", {card['quantization']}"
    how = f"{card['engine']} on {sweep.device}, {card['dtype']}{weights}"
    return f"{card['name']}: {sweep.task}, {how}"


def _draw_panel(axis: Any, sweep: Sweep, title: str, unit: str, value: Value) -> None:
    counts = sorted({point.max_num_seqs for point in sweep.points})
    colours = mpl.colormaps[_COLOURS]
    for place, count in enumerate(counts):
        line = [point for point in sweep.points if point.max_num_seqs == count]
        axis.plot(
            [point.max_num_batched_tokens for point in line],
            [value(point) for point in line],
            marker="o",
            color=colours(0.9 * place / max(1, len(counts) - 1)),
            label=f"{count} texts a step",
        )
    for goal, (mark, size, colour) in _MARKS.items():
        best = choose(sweep.points, goal)
        axis.scatter(
            [best.max_num_batched_tokens],
            [value(best)],
            marker=mark,
            s=size,
            facecolors="none" if goal == "memory" else colour,
            edgecolors=colour,
            linewidths=1.8,
            zorder=4,
            label=f"recommended for {goal}",
        )
    sizes = sorted({point.max_num_batched_tokens for point in sweep.points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes)
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("tokens a step (max_num_batched_tokens)")
    axis.set_ylabel(unit)
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    axis.margins(y=0.15)


def _share_limits(values: list[float]) -> tuple[float, float]:
    """From a little below the least to a little above one, so that equal lines lie apart."""
    spread = max(1 - min(values), 0.01)
    return min(values) - 0.1 * spread, 1 + 0.1 * spread
