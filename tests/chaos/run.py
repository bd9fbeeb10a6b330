"""A storm: random faults on a fleet, then quiet, then the oracle."""

from __future__ import annotations

import random
import time
from pathlib import Path

from chaos.asker import answers
from chaos.ends import strange_ends
from chaos.faults import Faults
from chaos.fleet import Fleet, Plan, write_json
from chaos.oracle import examine
from chaos.outcome import Outcome

_TICK_S = 0.02
CLIENTS_END_S = 90.0
QUIET_S = 90.0


def storm(
    folder: Path,
    plan: Plan,
    *,
    duration_s: float,
    gap_s: float = 0.3,
    weights: dict[str, int] | None = None,
) -> Outcome:
    """Faults at random for ``duration_s``, then quiet, then the oracle."""
    began = time.monotonic()
    outcome = Outcome()
    with Fleet(folder, plan) as fleet:
        faults = Faults(fleet, seed=plan.seed, weights=weights)
        gaps = random.Random(f"gaps/{plan.seed}")
        end = time.monotonic() + duration_s
        next_at = 0.0
        while (now := time.monotonic()) < end:
            _tend(fleet, faults)
            faults.heal_due()
            if now >= next_at:
                faults.begin_one()
                next_at = now + gaps.expovariate(1 / gap_s)
            time.sleep(_TICK_S)
        calm(fleet, faults)
        outcome.stuck += len(ended := end_clients(fleet))
        outcome.failures += ended
        loses = plan.persistence != "always"
        outcome.take(examine(fleet, quiet_s=QUIET_S, redis_lost_data=loses))
        outcome.failures += strange_ends(fleet) + faults.late
        outcome.kills, outcome.faults, outcome.fired = faults.kills, faults.faults, faults.fired
    outcome.asked = answers(folder)
    outcome.seconds, outcome.disk_kind = time.monotonic() - began, fleet.disk_kind
    (folder / "plan.txt").write_text("\n".join(faults.plan))
    write_json(folder / "outcome.json", {**outcome.to_json(), "failures": outcome.failures})
    return outcome


def _tend(fleet: Fleet, faults: Faults) -> None:
    points = {slot.name: slot.crash_at for slot in fleet.slots.values()}
    faults.note(fleet.tend(), points)


def calm(fleet: Fleet, faults: Faults) -> None:
    """No faults from here on: all is healed, and who waits for a crash point starts anew."""
    faults.heal_due(everything=True)
    fleet.proxy.heal()
    _tend(fleet, faults)
    for slot in fleet.slots.values():
        if slot.crash_at and slot.is_wanted:
            slot.kill()
            slot.wait(10.0)
            faults.kills[slot.role] += 1
            slot.start()


def end_clients(fleet: Fleet, deadline_s: float = CLIENTS_END_S) -> list[str]:
    """Let clients finish their operation; who did not."""
    (fleet.folder / "stop").touch()
    clients = fleet.of("producer", "http")
    end = time.monotonic() + deadline_s
    while any(slot.is_wanted for slot in clients):
        if time.monotonic() > end:
            late = [slot for slot in clients if slot.is_wanted]
            for slot in late:
                slot.is_wanted = False
                slot.kill()
            return [f"{slot.name} did not finish its operation" for slot in late]
        fleet.tend()
        time.sleep(_TICK_S)
    return []
