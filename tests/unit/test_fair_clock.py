"""The virtual clock, in an engine that runs what has the smallest number first."""

from __future__ import annotations

import heapq

from vecfleet.worker.engine import Priority
from vecfleet.worker.fair_clock import FairClock

INTERACTIVE, BULK = Priority.INTERACTIVE, Priority.BULK


class Engine:
    """One text at a time, by number and then by arrival."""

    def __init__(self) -> None:
        self.clock = FairClock()
        self.waiting: list[tuple[int, int, Priority, int]] = []
        self.arrived = 0
        self.tokens = {INTERACTIVE: 0, BULK: 0}

    def ask(self, priority: Priority, tokens: int, texts: int = 1) -> int:
        for _ in range(texts):
            self.arrived += 1
            if priority is INTERACTIVE:
                number = self.clock.interactive(tokens * texts)
            else:
                number = self.clock.bulk(tokens)
            heapq.heappush(self.waiting, (number, self.arrived, priority, tokens))
        return self.arrived

    def step(self) -> int:
        number, arrived, priority, tokens = heapq.heappop(self.waiting)
        self.clock.done(priority, number, tokens)
        self.tokens[priority] += tokens
        return arrived


def test_a_query_passes_bulk_that_waits():
    engine = Engine()
    engine.ask(BULK, 100, texts=1000)
    for _ in range(500):
        engine.step()
    query = engine.ask(INTERACTIVE, 10)
    assert query in {engine.step(), engine.step()}


def test_bulk_keeps_a_tenth_while_queries_never_end():
    engine = Engine()
    engine.ask(BULK, 100, texts=5000)
    for _ in range(32):
        engine.ask(INTERACTIVE, 10)
    for _ in range(20_000):
        before = engine.tokens[INTERACTIVE]
        engine.step()
        if engine.tokens[INTERACTIVE] > before:
            engine.ask(INTERACTIVE, 10)
    share = engine.tokens[BULK] / sum(engine.tokens.values())
    assert 0.09 < share < 0.12


def test_a_small_call_passes_a_large_one_and_does_not_starve_it():
    engine = Engine()
    large = engine.ask(INTERACTIVE, 100, texts=100)
    small = engine.ask(INTERACTIVE, 10)
    assert engine.step() == small
    steps = 0
    while engine.step() != large:
        engine.ask(INTERACTIVE, 10)
        steps += 1
        assert steps < 2000


def test_bulk_that_comes_after_a_rest_does_not_wait_for_what_was_before():
    engine = Engine()
    engine.ask(INTERACTIVE, 10, texts=1000)
    while engine.waiting:
        engine.step()
    bulk = engine.ask(BULK, 100)
    for _ in range(5):
        engine.ask(INTERACTIVE, 10)
    assert engine.step() == bulk  # its number is the clock's time: nothing was done since


def test_bulk_that_was_given_up_does_not_hold_back_what_comes_after():
    engine = Engine()
    engine.ask(BULK, 100, texts=5000)
    engine.waiting.clear()
    engine.clock.forget_bulk(100 * 5000)
    engine.ask(BULK, 100, texts=50)
    engine.ask(INTERACTIVE, 10, texts=50)
    for _ in range(60):
        engine.step()
        engine.ask(INTERACTIVE, 10)
    assert engine.tokens[BULK]
