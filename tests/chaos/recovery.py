"""How long a worker's death delays its jobs: isolated kills at the leases of production.

From the kill until the last of the victim's claims was settled by another worker, by Redis's clock.
On a light load that is the wait for the lease and the taking over, which is what the target is for.
Of a worker that dies with its window full, all that it held is computed text by text afterwards: a
figure of its own, which is mostly the time of so many single steps of the engine.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import redis
from chaos import settlements
from chaos.ends import strange_ends
from chaos.fleet import Fleet, Plan
from chaos.oracle import examine
from chaos.outcome import Outcome
from chaos.roles import Slot
from chaos.run import QUIET_S, end_clients

_TICK_S = 0.01
_ARRIVED_S = 0.5  # by then Redis has done what was on its way through the proxy
_MOST_WAIT_S = 60.0
_FULL_MOST_WAIT_S = 180.0
_FULL_JOBS = 32  # a worker's bulk window, see worker/main.py
_NEARLY_FULL_JOBS = 24  # it may have settled some before it is looked at
LIGHT = Plan(
    lease_s=0.0,
    workers=2,
    aggregators=1,
    producers=1,
    http_clients=1,
    pause_s=0.2,
    step_s=0.02,
)
FULL = replace(LIGHT, producers=0, http_clients=2, pause_s=0.0, given_share=False)


@dataclass(frozen=True, slots=True)
class Kill:
    """A victim, when it stopped by Redis's clock, and what it died with: (job, queue)."""

    at_s: float
    worker: str
    claims: frozenset[tuple[str, str]]

    def recovery_s(self, client: redis.Redis) -> float | None:
        """Seconds until others had settled all of its claims; None while they have not."""
        settled: dict[tuple[str, str], float] = {}
        for note in settlements.read(client):
            is_theirs = note.at_s >= self.at_s and note.worker != self.worker
            if is_theirs and note.outcome not in ("release", settlements.TAKEN_OVER):
                settled.setdefault((note.job, note.queue), note.at_s)
        if not self.claims <= settled.keys():
            return None
        return max(settled[claim] for claim in self.claims) - self.at_s


def recoveries(folder: Path, plan: Plan, *, count: int, fleets: int = 1) -> Outcome:
    """``count`` isolated kills, shared out over some fleets that run beside each other."""
    shares = [count // fleets + (n < count % fleets) for n in range(fleets)]
    total = Outcome()
    began = time.monotonic()
    with ThreadPoolExecutor(fleets) as pool:
        runs = [
            pool.submit(_one_fleet, folder / f"fleet{n}", replace(plan, seed=plan.seed + n), share)
            for n, share in enumerate(shares)
            if share
        ]
        for run in runs:
            total.add(run.result())
    total.seconds = time.monotonic() - began
    return total


def full_windows(folder: Path, plan: Plan, *, count: int) -> Outcome:
    """``count`` kills, one after the other, of workers that hold as much as they ever claim."""
    began = time.monotonic()
    total = _one_fleet(folder, plan, count, fill=_fill)
    total.seconds = time.monotonic() - began
    return total


def _one_fleet(
    folder: Path, plan: Plan, count: int, fill: Callable[[Fleet], None] | None = None
) -> Outcome:
    outcome = Outcome()
    chance = random.Random(f"recovery/{plan.seed}")
    most_wait_s = _FULL_MOST_WAIT_S if fill else _MOST_WAIT_S
    with Fleet(folder, plan) as fleet:
        for _ in range(count):
            victim = chance.choice(fleet.of("worker"))
            wait_s = chance.uniform(0.5, 2.0)
            if fill:
                fill(fleet)
            kill = _kill_with_claims(fleet, victim, _NEARLY_FULL_JOBS if fill else 1)
            outcome.kills["worker"] += 1
            seconds = _wait_until_settled(fleet, kill, most_wait_s)
            if seconds is None:
                outcome.stuck += 1
                outcome.failures.append(f"{kill.worker}'s claims were not settled: {kill.claims}")
            elif fill:
                outcome.full_windows.append((len(kill.claims), seconds))
            else:
                outcome.recoveries_s.append(seconds)
            if fill:
                for client in fleet.of("http", "producer"):
                    client.resume()
            fleet.tend()
            time.sleep(wait_s)
        outcome.failures += end_clients(fleet)
        outcome.take(examine(fleet, quiet_s=QUIET_S))
        outcome.failures += strange_ends(fleet)
    return outcome


def _fill(fleet: Fleet) -> None:
    """Let more wait than all workers may claim; then nobody adds to it.

    The clients stand still, so that what is measured is the window, and not what came after it.
    """
    workers, clients = fleet.of("worker"), fleet.of("http", "producer")
    for worker in workers:
        worker.pause()
    end = time.monotonic() + _MOST_WAIT_S
    while _waiting(fleet.redis) < 2 * len(workers) * _FULL_JOBS:
        if time.monotonic() > end:
            raise TimeoutError("the clients did not fill the queue")
        time.sleep(_TICK_S)
    for client in clients:
        client.pause()
    for worker in workers:
        worker.resume()


def _waiting(client: redis.Redis) -> int:
    lists = client.scan_iter("rq:queue:*.embed.*.bulk", count=1000)
    return sum(int(client.llen(name)) for name in lists)  # type: ignore[arg-type]


def _kill_with_claims(fleet: Fleet, victim: Slot, least: int) -> Kill:
    """Kill the victim while it holds so many claims."""
    end = time.monotonic() + _MOST_WAIT_S
    while time.monotonic() < end:
        fleet.tend()
        if len(_claims(fleet, victim.worker)) >= least:
            # It stops first: what it holds when all that it said has arrived is what it dies with.
            victim.pause()
            seconds, microseconds = fleet.redis.time()  # type: ignore[misc]
            time.sleep(_ARRIVED_S)
            claims = _claims(fleet, victim.worker)
            if len(claims) >= least:
                victim.kill()
                return Kill(seconds + microseconds / 1e6, victim.worker, frozenset(claims))
            victim.resume()
        time.sleep(_TICK_S)
    raise TimeoutError(f"{victim.worker} never held {least} claims")


def _claims(fleet: Fleet, worker: str) -> set[tuple[str, str]]:
    found = set()
    for raw in fleet.redis.scan_iter("vf:lease:*.embed.*", count=1000):
        members: Any = fleet.redis.zrange(raw, 0, -1)
        pipe = fleet.redis.pipeline(transaction=False)
        for member in members:
            pipe.hget(f"rq:execution:{member.decode()}", "worker_name")
        for member, holder in zip(members, pipe.execute(), strict=True):
            if holder is not None and holder.decode() == worker:
                queue = raw.decode().removeprefix("vf:lease:")
                found.add((member.decode().partition(":")[0], queue))
    return found


def _wait_until_settled(fleet: Fleet, kill: Kill, most_s: float) -> float | None:
    """The victim stays dead meanwhile, so that another worker has to take over."""
    end = time.monotonic() + most_s
    while (seconds := kill.recovery_s(fleet.redis)) is None and time.monotonic() < end:
        time.sleep(10 * _TICK_S)
    return seconds
