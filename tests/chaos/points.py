"""Every crash point in turn: a process dies there, its next life goes on, and nothing is wrong."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

from chaos.crash_points import POINTS, role_of
from chaos.ends import SIGKILLED, strange_ends
from chaos.fleet import Fleet, Plan
from chaos.oracle import examine
from chaos.outcome import Outcome
from chaos.roles import Slot
from chaos.run import QUIET_S, end_clients

_FIRES_WITHIN_S = 30.0
_TICK_S = 0.02
SWEEP = Plan(workers=2, aggregators=1, producers=1, http_clients=1, given_share=False, keepers=1)


def sweep(folder: Path, plan: Plan, *, times: int = 1) -> Outcome:
    """Let a process die ``times`` times at each point, in an order drawn from the seed.

    A point that is not reached is a failure: the harness and the product have come apart.
    """
    outcome = Outcome()
    began = time.monotonic()
    chance = random.Random(f"points/{plan.seed}")
    order = [point for point in POINTS for _ in range(times)]
    chance.shuffle(order)
    with Fleet(folder, plan) as fleet:
        for point in order:
            _die_at(fleet, point, chance, outcome)
        outcome.failures += end_clients(fleet)
        outcome.take(examine(fleet, quiet_s=QUIET_S))
        outcome.failures += strange_ends(fleet)
    outcome.kills = Counter(role_of(point) for point in outcome.fired.elements())
    outcome.seconds = time.monotonic() - began
    return outcome


def _die_at(fleet: Fleet, point: str, chance: random.Random, outcome: Outcome) -> None:
    victim, nth = chance.choice(fleet.of(role_of(point))), chance.randint(1, 2)
    life = victim.life
    victim.kill()
    victim.wait(10.0)
    victim.start(crash_at=point, nth=nth)
    end = time.monotonic() + _FIRES_WITHIN_S
    while victim.life == life + 1:
        fleet.tend()
        if POINTS[point].needs_deaths:
            _let_die_with_claims([slot for slot in fleet.of("worker") if slot is not victim])
        if time.monotonic() > end:
            outcome.failures.append(f"nobody came to the crash point {point}")
            victim.kill()
            victim.wait(10.0)
            victim.start()
            return
        time.sleep(_TICK_S)
    if victim.codes[-1] == SIGKILLED:
        outcome.fired[point] += 1
    else:
        outcome.failures.append(f"{victim.name} ended with {victim.codes[-1]}, not at {point}")


def _let_die_with_claims(slots: list[Slot]) -> None:
    for slot in slots:
        if not slot.crash_at:
            slot.kill()
            slot.wait(10.0)
            slot.start(crash_at="worker.after_claim")
