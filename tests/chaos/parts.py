"""The parts of a run: each is told whole by one line, which runs the same again."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from chaos.fleet import Plan
from chaos.outcome import Outcome
from chaos.points import SWEEP, sweep
from chaos.recovery import FULL, LIGHT, full_windows, recoveries
from chaos.run import storm

Kind = Literal["storm", "points", "recovery", "full_windows"]
_PLANS = {"points": SWEEP, "recovery": LIGHT, "full_windows": FULL}


@dataclass(frozen=True, slots=True)
class Part:
    """One run of the harness, with all that it depends on but the machine."""

    kind: Kind
    plan: Plan
    duration_s: float = 0.0  # of a storm
    gap_s: float = 0.25  # on average between two faults of a storm
    weights: dict[str, int] = field(default_factory=dict)  # of its faults; empty: the usual ones
    times: int = 1  # at each crash point; or how many kills
    fleets: int = 1  # that the kills are shared out over

    def run(self, folder: Path) -> Outcome:
        """Run it."""
        match self.kind:
            case "storm":
                return storm(
                    folder,
                    self.plan,
                    duration_s=self.duration_s,
                    gap_s=self.gap_s,
                    weights=self.weights or None,
                )
            case "points":
                return sweep(folder, self.plan, times=self.times)
            case "recovery":
                return recoveries(folder, self.plan, count=self.times, fleets=self.fleets)
            case "full_windows":
                return full_windows(folder, self.plan, count=self.times)

    def __str__(self) -> str:
        """What it is, for people."""
        seed = f"seed {self.plan.seed}"
        match self.kind:
            case "storm":
                return f"storm of {seed}, Redis with {self.plan.persistence}"
            case "points":
                return f"each crash point {self.times} times, {seed}"
            case "recovery":
                return f"{self.times} isolated kills at production leases, {seed}"
            case "full_windows":
                return f"{self.times} kills of workers whose window is full, {seed}"

    @property
    def command(self) -> str:
        """What runs the same plan again."""
        words = shlex.quote(json.dumps(asdict(self), separators=(",", ":")))
        return f"PYTHONPATH=tests python -m chaos --replay {words}"

    @classmethod
    def of(cls, text: str) -> Part:
        """The part that a ``command`` names."""
        wire = json.loads(text)
        plan = {name: _without_lists(value) for name, value in wire.pop("plan").items()}
        return cls(plan=Plan(**plan), **wire)


def _without_lists(value: Any) -> Any:
    return tuple(map(_without_lists, value)) if isinstance(value, list) else value


def part(kind: Kind, *, seed: int, times: int = 1, fleets: int = 1) -> Part:
    """A part that is no storm, on the fleet that is usual for it."""
    return Part(kind, replace(_PLANS[kind], seed=seed), times=times, fleets=fleets)
