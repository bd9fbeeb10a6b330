"""Which steps are recommended, how refused ones are told, and that the plot can be drawn."""

from __future__ import annotations

import numpy as np
import pytest

from vecfleet.common.errors import ConfigError, EngineFailed
from vecfleet.fleet import sweep
from vecfleet.fleet.engine_probe import Figures, ProbeTask
from vecfleet.fleet.sweep import Point, Refused, Sweep, choose, grid, judged, run_sweep
from vecfleet.fleet.sweep_plot import draw

CARD = {"name": "m", "engine": "torch", "dtype": "float32", "quantization": "int8"}


def point(tokens, texts, rate, wait_ms, memory) -> Point:
    return Point(tokens, texts, rate / 100, rate, wait_ms / 1000, wait_ms / 1000, memory)


POINTS = [
    point(512, 8, 700, 10, 500),
    point(1024, 8, 850, 20, 520),
    point(1024, 32, 960, 30, 600),
    point(4096, 32, 1000, 120, 900),
]


def test_speed_is_the_shortest_wait_among_the_nearly_fastest():
    assert choose(POINTS, "speed") is POINTS[2]


def test_memory_is_the_smallest_that_is_fast_enough():
    assert choose(POINTS, "memory") is POINTS[1]


def test_of_those_as_small_the_fastest_is_for_memory():
    nearly = point(2048, 16, 900, 40, 525)
    assert choose([*POINTS, nearly], "memory") is nearly


def test_a_single_point_is_best_for_everything():
    assert choose(POINTS[:1], "speed") is choose(POINTS[:1], "memory") is POINTS[0]


def test_efficiency_is_a_share_of_the_best():
    assert [p.efficiency for p in judged(POINTS, None)] == [0.7, 0.85, 0.96, 1.0]


def test_agreement_is_with_the_largest_steps_wherever_they_stand():
    rising = np.arange(9, dtype=np.float32)
    scores = [rising, rising, rising, -rising]
    found = judged([POINTS[3], POINTS[0], POINTS[2], POINTS[1]], scores)
    assert [round(p.agreement) for p in found] == [1, 1, 1, -1]


def test_the_grid_has_every_pair_once_from_small_to_large():
    assert list(grid((2, 1, 2), (4, 3))) == [(1, 3), (1, 4), (2, 3), (2, 4)]


def figures(seconds: float) -> Figures:
    return Figures(CARD, "cpu", 1.0, 10, 20, None, 4, 100, seconds, 0.1, None)


def test_sizes_that_the_engine_refuses_are_told_and_the_rest_measured(monkeypatch):
    asked = []

    def probe(task):
        asked.append(task.settings)
        if task.settings["max_num_batched_tokens"] < 600:
            raise ConfigError("a text must fit a step")
        return figures(2.0), np.arange(4, dtype=np.float32)

    monkeypatch.setattr(sweep, "probe", probe)
    told = []
    found = run_sweep(
        ProbeTask({"model": "m"}, pairs=[("q", "d")] * 4), [(512, 8), (1024, 8)], told.append
    )
    assert found.refused == (Refused(512, 8, "a text must fit a step"),)
    assert [p.max_num_batched_tokens for p in found.points] == [1024]
    assert [type(one) for one in told] == [Refused, Point]
    assert asked[1] == {"model": "m", "max_num_batched_tokens": 1024, "max_num_seqs": 8}
    assert (found.task, found.points[0].tokens_per_s, found.points[0].memory_bytes) == (
        "rerank",
        50,
        20,
    )
    assert found.to_wire()["recommended"]["speed"]["max_num_seqs"] == 8


def test_an_engine_that_takes_no_size_is_an_error(monkeypatch):
    def probe(task):
        raise EngineFailed("no memory")

    monkeypatch.setattr(sweep, "probe", probe)
    with pytest.raises(EngineFailed, match="no memory"):
        run_sweep(ProbeTask({}, texts=["a"]), [(1, 1)])


@pytest.mark.parametrize("task", ["embed", "rerank"])
@pytest.mark.parametrize("count", [1, 4])
def test_the_plot_is_a_png_with_four_panels(tmp_path, task, count):
    drawn = Sweep(task, CARD, "cpu", judged(POINTS[:count], None))
    draw(drawn, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (tmp_path / "plot.png").stat().st_size > 20_000
