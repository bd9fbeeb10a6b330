"""The faults of a random run: each begins at once, and some are healed a while later.

Each draws from a stream of its own, and takes its victim among all slots, running or not: so what
one comes to changes nothing in those after it, and a seed names one plan.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import redis
from chaos.crash_points import POINTS, role_of
from chaos.fleet import Fleet
from chaos.roles import Slot

Heal = tuple[float, int, Callable[[], None]]  # when, a number that breaks ties, what

_VICTIMS = {"worker": 45, "aggregator": 20, "gateway": 13, "producer": 12, "search": 5, "http": 5}
_DRAINED_WITHIN_S = 90.0  # a drain lasts a minute at most
_WEIGHTS = {
    "kill": 60,
    "crash_point": 22,
    "stop": 10,
    "drain": 6,
    "cut": 3,
    "delay": 3,
    "lose_replies": 3,
    "cut_requests": 2,
    "refuse": 1,
    "stall": 1,
    "kill_redis": 2,
    "fill_redis": 2,
    "fill_disk": 2,
}
_POWER_CUTS = 14  # where Redis may lose something, which is what such a storm is for
NETWORK = ("cut", "delay", "lose_replies", "cut_requests", "refuse", "stall")


class Faults:
    """Draws faults from a seed and carries them out."""

    def __init__(self, fleet: Fleet, *, seed: int, weights: dict[str, int] | None = None) -> None:
        self._fleet = fleet
        self._seed = seed
        self._chance = random.Random()
        self._weights = {**_WEIGHTS} if weights is None else weights
        if weights is None and fleet.plan.persistence != "always":
            self._weights["kill_redis"] = _POWER_CUTS
        self._heals: list[Heal] = []
        self._ties = itertools.count()
        self.kills: Counter[str] = Counter()  # SIGKILLs, by role; also those of crash points
        self.fired: Counter[str] = Counter()  # by crash point
        self.faults: Counter[str] = Counter()  # all that began, by kind
        self.late: list[str] = []  # who did not end when it was told to
        self.plan: list[str] = []  # all that was drawn, in words: of what kind, and whom it meets

    def begin_one(self) -> str:
        """Let the next fault begin; its kind, "" where there was no victim for it."""
        self._chance = random.Random(f"faults/{self._seed}/{len(self.plan)}")
        kinds = list(self._weights)
        kind = self._chance.choices(kinds, list(self._weights.values()))[0]
        self.plan.append(kind)
        begun = bool(getattr(self, f"_{kind}")())
        self.faults[kind] += begun
        return kind if begun else ""

    def note(self, died: list[Slot], crash_points: dict[str, str]) -> None:
        """Count who died at a crash point; ``crash_points`` were those of the lives that ended."""
        for slot in died:
            point = crash_points.get(slot.name, "")
            if point and slot.codes and slot.codes[-1] == -9:
                self.fired[point] += 1
                self.kills[slot.role] += 1

    def heal_due(self, *, everything: bool = False) -> None:
        """Heal what is due; all of it at the end."""
        while self._heals and (everything or self._heals[0][0] <= time.monotonic()):
            heapq.heappop(self._heals)[2]()

    def _later(self, least_s: float, most_s: float, heal: Callable[[], None]) -> None:
        when = time.monotonic() + self._chance.uniform(least_s, most_s)
        heapq.heappush(self._heals, (when, next(self._ties), heal))

    # Processes

    def _victim(self, *roles: str) -> Slot | None:
        chosen = roles or tuple(_VICTIMS)
        role = self._chance.choices(chosen, [_VICTIMS[name] for name in chosen])[0]
        slots = self._fleet.of(role)
        if not slots:
            return None
        victim = self._chance.choice(slots)
        self.plan[-1] += f" {victim.name}"
        meets = victim.is_wanted and victim.running() and not victim.is_stopped
        return victim if meets else None

    def _kill(self) -> bool:
        victim = self._victim()
        if victim is not None:
            victim.kill()
            victim.crash_at = ""
            self.kills[victim.role] += 1
        return victim is not None

    def _crash_point(self) -> bool:
        """Its next life ends at a crash point; this one ends now."""
        point = self._chance.choice(list(POINTS))
        nth = self._chance.randint(1, 3)
        victim = self._victim(role_of(point))
        if victim is None:
            return False
        victim.kill()
        victim.wait(10.0)
        self.kills[victim.role] += 1
        victim.start(crash_at=point, nth=nth)
        return True

    def _stop(self) -> bool:
        """SIGSTOP until its leases have run out, then SIGCONT."""
        victim = self._victim("worker", "aggregator", "gateway")
        if victim is None:
            return False
        life = victim.life
        victim.pause()

        def resume() -> None:
            if victim.life == life and victim.running():
                victim.resume()

        lease_s = self._fleet.plan.lease_s
        self._later(1.2 * lease_s, 2.5 * lease_s, resume)
        return True

    def _drain(self) -> bool:
        """SIGTERM: it gives back or finishes what it has, and ends."""
        victim = self._victim("worker", "aggregator")
        if victim is None:
            return False
        life, began = victim.life, time.monotonic()
        victim.terminate()

        def look() -> None:
            late = time.monotonic() - began > _DRAINED_WITHIN_S
            if late and victim.life == life and victim.running() and not victim.is_stopped:
                self.late.append(f"{victim.name} goes on {_DRAINED_WITHIN_S} s after its SIGTERM")

        self._later(_DRAINED_WITHIN_S, _DRAINED_WITHIN_S + 1.0, look)
        return True

    # The network

    def _disturb(self, least_s: float, most_s: float, **how: Any) -> bool:
        self._fleet.proxy.disturb(**how)
        self._later(least_s, most_s, self._fleet.proxy.heal)
        return True

    def _cut(self) -> bool:
        self._fleet.proxy.cut()
        return True

    def _delay(self) -> bool:
        return self._disturb(0.5, 2.0, delay_s=self._chance.uniform(0.01, 0.1))

    def _lose_replies(self) -> bool:
        return self._disturb(0.3, 1.0, lose=self._chance.uniform(0.02, 0.2))

    def _cut_requests(self) -> bool:
        return self._disturb(0.3, 1.0, cut=self._chance.uniform(0.02, 0.2))

    def _refuse(self) -> bool:
        self._fleet.proxy.cut()
        return self._disturb(0.3, 1.5, refuse=True)

    def _stall(self) -> bool:
        lease_s = self._fleet.plan.lease_s
        return self._disturb(0.3, 2.0 * lease_s, stall=True)

    # Redis and the disk

    def _kill_redis(self) -> bool:
        self._fleet.restart_redis(wait_s=self._chance.uniform(0.0, 0.5))
        self.kills["redis"] += 1
        return True

    def _fill_redis(self) -> bool:
        try:
            self._fleet.fill_redis()
        except redis.RedisError:
            return False
        self._later(0.5, 2.5, self._fleet.empty_redis)
        return True

    def _fill_disk(self) -> bool:
        self._fleet.fill_disk()
        self._later(0.5, 2.5, self._fleet.empty_disk)
        return True
