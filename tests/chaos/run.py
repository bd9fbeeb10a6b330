"""Runs of the harness: a storm of random faults, and isolated kills for the recovery's time."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.faults import Faults
from chaos.fleet import Fleet, Plan, write_json
from chaos.oracle import Verdict, examine

_TICK_S = 0.02
CLIENTS_END_S = 90.0
QUIET_S = 90.0


@dataclass(slots=True)
class Outcome:
    """What a run came to; runs can be summed."""

    kills: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    fired: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    documents: int = 0
    dead: int = 0
    lost: int = 0
    doubled: int = 0
    stuck: int = 0
    recoveries_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # what is wrong, and how to see it again
    seconds: float = 0.0
    disk_kind: str = ""  # how a full disk was brought about

    @property
    def is_kept(self) -> bool:
        """Whether the promise was kept."""
        return not (self.lost or self.doubled or self.stuck or self.failures)

    def add(self, other: Outcome) -> None:
        """Add another run's."""
        for name in ("kills", "faults", "fired"):
            getattr(self, name).update(getattr(other, name))
        for name in ("acknowledged", "documents", "dead", "lost", "doubled", "stuck", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.recoveries_s += other.recoveries_s
        self.failures += other.failures

    def take(self, verdict: Verdict) -> None:
        """Add a verdict."""
        self.acknowledged += verdict.acknowledged
        self.documents += verdict.documents
        self.dead += verdict.dead
        self.lost += len(verdict.lost)
        self.doubled += len(verdict.doubled)
        self.stuck += len(verdict.stuck)
        if not verdict.is_kept:
            self.failures.append(str(verdict))

    def to_json(self) -> dict[str, Any]:
        """The line at the end of ``make chaos``."""
        return {
            "kills": sum(self.kills.values()),
            "faults": sum(self.faults.values()),
            "acknowledged": self.acknowledged,
            "lost": self.lost,
            "doubled": self.doubled,
            "stuck": self.stuck,
            "recovery_p50_s": quantile(self.recoveries_s, 0.50),
            "recovery_p99_s": quantile(self.recoveries_s, 0.99),
        }


def quantile(values: list[float], share: float) -> float | None:
    """The value that ``share`` of all do not exceed; None where there is none."""
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)


def storm(
    folder: Path,
    plan: Plan,
    *,
    duration_s: float,
    gap_s: float = 0.3,
    weights: dict[str, int] | None = None,
    most_faults: int = 0,
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
            if most_faults and sum(faults.faults.values()) >= most_faults:
                break
            time.sleep(_TICK_S)
        calm(fleet, faults)
        outcome.stuck += len(ended := end_clients(fleet))
        outcome.failures += ended
        loses = plan.persistence != "always"
        outcome.take(examine(fleet, quiet_s=QUIET_S, redis_lost_data=loses))
        outcome.failures += strange_ends(fleet)
        outcome.kills, outcome.faults, outcome.fired = faults.kills, faults.faults, faults.fired
    outcome.seconds, outcome.disk_kind = time.monotonic() - began, fleet.disk_kind
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


def strange_ends(fleet: Fleet) -> list[str]:
    """Processes that ended in a way that nobody asked for."""
    # 1: a writer that was taken over, or a start without Redis; 3: the same
    allowed = {0, 1, 3, -9}
    said = []
    for slot in fleet.slots.values():
        strange = [code for code in slot.codes if code not in allowed]
        if strange:
            log = (fleet.folder / f"{slot.name}.log").read_text(errors="replace")
            said.append(f"{slot.name} ended with {strange}:\n{log[-1500:]}")
    return said


def replay(options: str, seed: int) -> str:
    """The command that runs the same plan again."""
    return f"PYTHONPATH=tests python -m chaos --seed {seed} {options}"
