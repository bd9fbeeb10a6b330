"""What is run within so many seconds, and what there was no time for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from chaos.crash_points import POINTS
from chaos.fleet import Persistence, Plan, with_everything, with_mutant
from chaos.outcome import LEAST_RECOVERIES, Outcome
from chaos.parts import Part, part

_ROUND_S = 120.0  # of one storm: then the oracle looks, and a new fleet begins
_LEAST_ROUND_S = 20.0
_FLEETS = 4
_MOST_KILLS = 60  # isolated ones
_MOST_FULL = 4
# What things take on two slow cores, seconds:
_KILL_S = 5.0  # an isolated one, with four fleets beside each other
_FULL_S = 40.0  # a kill of a worker whose window is full
_POINT_S = 1.5  # a death at a crash point
_SHARE = 0.2  # of all time, at most, for any of the parts but the storms with ``always``
_TARGET_KILLS, _TARGET_AT_A_POINT = 1000, 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a run was asked for; None is what fits into the time."""

    duration_s: float
    seed: int
    gap_s: float = 0.25
    lease_s: float = 1.0
    redis: Persistence | None = None  # None: storms of each kind
    mutant: str = ""
    points: int | None = None  # times at each
    recovery: int | None = None  # isolated kills
    full: int | None = None  # kills with full windows


class Agenda:
    """The parts of a run, as its time goes by."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        duration_s = wanted.duration_s
        fits = _SHARE * duration_s
        self.kills = _given(wanted.recovery, min(_MOST_KILLS, int(fits / _KILL_S)))
        self.full = _given(wanted.full, min(_MOST_FULL, int(0.75 * fits / _FULL_S)))
        self.times = _given(wanted.points, min(1, int(fits / _POINT_S / len(POINTS))))
        asked = self.kills * _KILL_S + self.full * _FULL_S + self.times * _POINT_S * len(POINTS)
        self.left_s = max(0.0, duration_s - asked)
        self._storms = 0

    def first(self) -> Iterator[Part]:
        """Before the storms of ``always``."""
        wanted = self._wanted
        if self.times:
            yield part("points", seed=wanted.seed, times=self.times)
        round_s = min(_ROUND_S, self.left_s / 6)
        if wanted.redis is None and round_s >= _LEAST_ROUND_S:
            for redis in ("everysec", "none"):
                yield self._storm(redis, round_s)

    def next_storm(self) -> Part | None:
        """One more storm, where there is time for it."""
        if self.left_s <= 1.0:
            return None
        return self._storm(self._wanted.redis or "always", min(self.left_s, _ROUND_S))

    def last(self) -> Iterator[Part]:
        """After the storms."""
        if self.kills:
            yield part("recovery", seed=self._wanted.seed, times=self.kills, fleets=_FLEETS)
        if self.full:
            yield part("full_windows", seed=self._wanted.seed, times=self.full)

    def took(self, seconds: float) -> None:
        """A storm is over."""
        self.left_s -= max(seconds, 1.0)

    def _storm(self, redis: Persistence, duration_s: float) -> Part:
        wanted = self._wanted
        plan = Plan(
            seed=wanted.seed + self._storms,
            small_disk=True,
            lease_s=wanted.lease_s,
            persistence=redis,
            # Where Redis may lose what it accepted, a client counts on what is done.
            until="accepted" if redis == "always" else "done",
        )
        plan = with_everything(plan)
        self._storms += 1
        if wanted.mutant:
            plan = with_mutant(plan, wanted.mutant)
        return Part("storm", plan, duration_s=round(duration_s, 1), gap_s=wanted.gap_s)


def _given(asked: int | None, fits: int) -> int:
    return fits if asked is None else asked


def not_shown(done: list[Part], total: Outcome) -> list[str]:
    """Which targets a run was too short for."""
    short = []
    kinds = {p.plan.persistence for p in done if p.kind == "storm"}
    for redis in ("always", "everysec", "none"):
        if redis not in kinds:
            short.append(f"no storm with Redis on {redis}")
    least = min((total.fired[point] for point in POINTS), default=0)
    if least < _TARGET_AT_A_POINT:
        short.append(f"{least} deaths at the least visited crash point, of {_TARGET_AT_A_POINT}")
    if (kills := sum(total.kills.values())) < _TARGET_KILLS:
        short.append(f"{kills} kills, of {_TARGET_KILLS}")
    if (kills := len(total.recoveries_s)) < LEAST_RECOVERIES:
        short.append(f"{kills} isolated kills, of {LEAST_RECOVERIES}: recovery is not judged")
    if not total.full_windows:
        short.append("no kill with a full window")
    return short
