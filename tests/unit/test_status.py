"""The rate that a worker tells: what its engine can do, not what it happened to be given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vecfleet.worker.engine import EngineStats
from vecfleet.worker.status import EngineStatus


class Counting:
    """An engine of which nothing but its counters matters."""

    device = "cpu"
    card = SimpleNamespace(name="m")

    def __init__(self) -> None:
        self.stats = EngineStats(0, 0, 0, 0.0, 0, 0.0)

    def does(self, steps: int, tokens: int, step_s: float, pending: int = 0) -> None:
        """So many steps of so many tokens each; ``pending`` wait afterwards."""
        s = self.stats
        self.stats = EngineStats(
            s.tokens + steps * tokens,
            s.texts,
            s.steps + steps,
            s.busy_s + steps * step_s,
            pending,
            0.0,
        )


@pytest.fixture
def engine() -> Counting:
    return Counting()


@pytest.fixture
def status(engine: Counting) -> EngineStatus:
    return EngineStatus(engine)  # type: ignore[arg-type]


def told(status: EngineStatus) -> tuple[object, object]:
    fields = status.fields()
    return fields["tokens_per_s"], fields["was_full"]


def test_single_queries_do_not_say_what_it_can_do(engine: Counting, status: EngineStatus) -> None:
    assert told(status) == (0.0, 0)
    engine.does(100, 10, 0.01, pending=10)
    assert told(status) == (1000.0, 0)


def test_full_steps_say_it_and_single_ones_take_nothing_back(
    engine: Counting, status: EngineStatus
) -> None:
    engine.does(100, 10, 0.01, pending=100_000)
    told(status)
    engine.does(10, 4000, 0.2, pending=100_000)
    assert told(status) == (20_000.0, 1)
    engine.does(1000, 10, 0.01, pending=10)
    assert told(status) == (20_000.0, 1)
    assert told(status) == (20_000.0, 1)  # nothing was done meanwhile


def test_an_engine_that_got_slower_says_so_when_it_is_full(
    engine: Counting, status: EngineStatus
) -> None:
    for _ in range(2):
        engine.does(10, 4000, 0.2, pending=100_000)
        told(status)
    engine.does(25, 4000, 0.4, pending=100_000)  # ten seconds: half of the way
    assert told(status)[0] == pytest.approx(15_000)


def test_the_first_full_steps_count_at_once_even_if_slower(
    engine: Counting, status: EngineStatus
) -> None:
    engine.does(1, 2000, 0.05, pending=100_000)
    assert told(status) == (40_000.0, 0)
    engine.does(10, 4000, 0.2, pending=100_000)
    assert told(status) == (20_000.0, 1)


def test_texts_that_have_just_come_do_not_make_full_steps_of_those_before(
    engine: Counting, status: EngineStatus
) -> None:
    engine.does(100, 10, 0.01)
    told(status)
    engine.does(100, 10, 0.01, pending=100_000)
    assert told(status) == (1000.0, 0)
    engine.does(10, 4000, 0.2)
    assert told(status) == (20_000.0, 0), "they are done"
    engine.does(10, 4000, 0.2, pending=100_000)
    told(status)
    engine.does(10, 4000, 0.4, pending=100_000)
    assert told(status) == (10_000.0, 1)


def test_an_engine_that_stood_idle_begins_anew(engine: Counting, status: EngineStatus) -> None:
    engine.does(10, 4000, 0.2, pending=100_000)
    told(status)
    engine.does(0, 0, 0.0)  # what waited was cancelled
    told(status)
    engine.does(100, 10, 0.01, pending=100_000)
    assert told(status) == (20_000.0, 0)
