"""How long a worker's death delays its jobs: isolated kills at the leases of production.

From the kill until the last of the victim's claims was settled by another worker. The fleet is
lightly loaded, as what is measured is the wait for the lease and the taking over, not a backlog:
what a dead worker held is computed text by text, so a worker that held thousands of texts costs
what so many single steps of its engine take.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from chaos.fleet import Fleet, Plan, settled_lines
from chaos.oracle import examine
from chaos.roles import Slot
from chaos.run import QUIET_S, Outcome, end_clients, strange_ends

_TICK_S = 0.01
_MOST_WAIT_S = 60.0
_PLAN = Plan(
    lease_s=0.0,
    workers=2,
    aggregators=1,
    producers=1,
    http_clients=1,
    pause_s=0.2,
    step_s=0.02,
)


def recoveries(folder: Path, *, count: int, seed: int, fleets: int = 4) -> Outcome:
    """``count`` isolated kills, shared out over some fleets that run beside each other."""
    shares = [count // fleets + (n < count % fleets) for n in range(fleets)]
    total = Outcome()
    began = time.monotonic()
    with ThreadPoolExecutor(fleets) as pool:
        runs = [
            pool.submit(_one_fleet, folder / f"fleet{n}", share, seed + n)
            for n, share in enumerate(shares)
            if share
        ]
        for run in runs:
            total.add(run.result())
    total.seconds = time.monotonic() - began
    return total


def _one_fleet(folder: Path, count: int, seed: int) -> Outcome:
    outcome = Outcome()
    chance = random.Random(f"recovery/{seed}")
    killed: list[tuple[float, str, set[tuple[str, str]]]] = []
    with Fleet(folder, replace(_PLAN, seed=seed)) as fleet:
        for _ in range(count):
            victim = chance.choice(fleet.of("worker"))
            claims = _kill_with_claims(fleet, victim)
            killed.append((time.monotonic(), victim.worker, claims))
            _wait_until_settled(fleet, killed[-1])
            fleet.tend()
            time.sleep(chance.uniform(0.5, 2.0))
        ended = end_clients(fleet)
        outcome.failures += ended
        outcome.take(examine(fleet, quiet_s=QUIET_S))
        outcome.failures += strange_ends(fleet)
    outcome.kills["worker"] += count
    for kill in killed:
        seconds = _recovery_s(folder, kill)
        if seconds is None:
            outcome.stuck += 1
            outcome.failures.append(f"{kill[1]}'s claims were not settled: {kill[2]}")
        else:
            outcome.recoveries_s.append(seconds)
    return outcome


def _kill_with_claims(fleet: Fleet, victim: Slot) -> set[tuple[str, str]]:
    """Kill the victim while it holds claims; what it held: (job, queue)."""
    end = time.monotonic() + _MOST_WAIT_S
    while time.monotonic() < end:
        fleet.tend()
        if _claims(fleet, victim.worker):
            # It stops first: what it holds then is what it dies with.
            victim.pause()
            time.sleep(_TICK_S)
            if claims := _claims(fleet, victim.worker):
                victim.kill()
                return claims
            victim.resume()
        time.sleep(_TICK_S)
    raise TimeoutError(f"{victim.worker} never held a claim")


def _claims(fleet: Fleet, worker: str) -> set[tuple[str, str]]:
    found = set()
    for raw in fleet.redis.scan_iter("vf:lease:*.embed.*"):
        queue = raw.decode().removeprefix("vf:lease:")
        members: Any = fleet.redis.zrange(raw, 0, -1)
        for member in members:
            holder: Any = fleet.redis.hget(f"rq:execution:{member.decode()}", "worker_name")
            if holder is not None and holder.decode() == worker:
                found.add((member.decode().partition(":")[0], queue))
    return found


def _wait_until_settled(fleet: Fleet, kill: tuple[float, str, set[tuple[str, str]]]) -> None:
    """The victim stays dead meanwhile, so that another worker has to take over."""
    end = time.monotonic() + _MOST_WAIT_S
    while _recovery_s(fleet.folder, kill) is None and time.monotonic() < end:
        time.sleep(10 * _TICK_S)


def _recovery_s(folder: Path, kill: tuple[float, str, set[tuple[str, str]]]) -> float | None:
    """Seconds until all of the victim's claims were settled by others; None while they are not."""
    killed_at, victim, claims = kill
    settled: dict[tuple[str, str], float] = {}
    for when, worker, job, queue, outcome in settled_lines(folder):
        if when >= killed_at and worker != victim and outcome != "Release":
            settled.setdefault((job, queue), when)
    if not claims <= settled.keys():
        return None
    return max(settled[claim] for claim in claims) - killed_at
