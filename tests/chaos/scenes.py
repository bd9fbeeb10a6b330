"""Short runs that bring about one thing each, for tests and for the harness's proof of itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from chaos import settlements
from chaos.ends import SIGKILLED, strange_ends
from chaos.fleet import Fleet, Plan, with_mutant
from chaos.oracle import examine
from chaos.roles import Slot
from chaos.run import end_clients
from chaos.verdict import Verdict

QUICK = Plan(workers=2, aggregators=1, producers=1, http_clients=2, pause_s=0.03)
_DEADLINE_S = 60.0
_TICK_S = 0.02


def wait(fleet: Fleet, true: Callable[[], bool], what: str) -> None:
    """Until ``true()``, while the dead are started again."""
    end = time.monotonic() + _DEADLINE_S
    while not true():
        fleet.tend()
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come true within {_DEADLINE_S} s")
        time.sleep(_TICK_S)


def acknowledged(fleet: Fleet) -> int:
    """How many calls the ledgers hold."""
    return sum(path.read_bytes().count(b'"documents"') for path in fleet.ledgers())


def wait_for_progress(fleet: Fleet, calls: int) -> None:
    """Until so many more calls were acknowledged."""
    wanted = acknowledged(fleet) + calls
    wait(fleet, lambda: acknowledged(fleet) >= wanted, f"{calls} more acknowledged calls")


def wait_for_settlement_by(fleet: Fleet, slot: Slot) -> None:
    """Until this life of the slot has settled something."""
    since = time.time()  # Redis runs on this machine
    wait(
        fleet,
        lambda: any(
            note.at_s > since and slot.is_named(note.worker)
            for note in settlements.read(fleet.redis)
        ),
        f"{slot.name} settles something",
    )


def finish(
    fleet: Fleet, *, quiet_s: float = 30.0, redis_lost_data: bool = False
) -> tuple[Verdict, list[str]]:
    """End the clients and ask the oracle: its verdict, and what else was strange."""
    strange = end_clients(fleet)
    verdict = examine(fleet, quiet_s=quiet_s, redis_lost_data=redis_lost_data)
    return verdict, strange + strange_ends(fleet)


def die_at(fleet: Fleet, slot: Slot, point: str, nth: int = 1) -> None:
    """Let the slot's next life end at a crash point, and wait until it has."""
    slot.kill()
    slot.wait(_DEADLINE_S)
    slot.start(crash_at=point, nth=nth)
    life = slot.life
    wait(fleet, lambda: slot.life > life, f"{slot.name} at {point}")
    if slot.codes[-1] != SIGKILLED:
        raise AssertionError(f"{slot.name} ended with {slot.codes[-1]} and not at {point}")


def stop_at(fleet: Fleet, slot: Slot, point: str) -> None:
    """Let the slot's next life stop itself at a point, and wait until it stands still."""
    slot.kill()
    slot.wait(_DEADLINE_S)
    slot.start(crash_at=point, stops=True)
    slot.crash_at = ""
    wait(fleet, slot.has_stopped, f"{slot.name} stands still at {point}")


def stop_past_lease(fleet: Fleet, slot: Slot, point: str) -> None:
    """Let the slot's next life stop itself at a point, and go on when it has lost its leases."""
    stop_at(fleet, slot, point)
    end = time.monotonic() + 2.5 * fleet.plan.lease_s  # by then its leases are others'
    wait(fleet, lambda: time.monotonic() > end, "two leases are over")
    slot.resume()


def _planted(fleet: Fleet) -> None:
    wait_for_progress(fleet, 30)


def _late_arrivals(fleet: Fleet) -> None:
    """Blocks come again after newer ones: their worker died, and its leases had to run out."""
    wait_for_progress(fleet, 20)
    die_at(fleet, fleet.of("worker")[0], "worker.after_engine", 5)
    wait_for_progress(fleet, 5)


def _dying_writers(fleet: Fleet) -> None:
    for _ in range(3):
        wait_for_progress(fleet, 10)
        die_at(fleet, fleet.of("aggregator")[0], "aggregator.before_commit")


def _zombies(fleet: Fleet) -> None:
    wait_for_progress(fleet, 5)
    stop_past_lease(fleet, fleet.of("worker")[0], "worker.before_settle")
    wait_for_progress(fleet, 5)


_SCENES: dict[str, Callable[[Fleet], None]] = {
    "planted_loss": _planted,
    "planted_double": _planted,
    "no_version_check": _late_arrivals,
    "settle_before_commit": _dying_writers,
    "no_fence": _zombies,
}


def with_mutant_planted(folder: Path, mutant: str, *, seed: int) -> Verdict:
    """The verdict over the scene that shows a mutant."""
    with Fleet(folder, with_mutant(replace(QUICK, seed=seed), mutant)) as fleet:
        _SCENES[mutant](fleet)
        return finish(fleet, quiet_s=4.0)[0]


def without_mutants(folder: Path, *, seed: int) -> tuple[Verdict, list[str]]:
    """The verdict over the same scenes, one after the other, of the product as it is."""
    with Fleet(folder, replace(QUICK, seed=seed)) as fleet:
        for scene in dict.fromkeys(_SCENES.values()):
            scene(fleet)
        return finish(fleet)
