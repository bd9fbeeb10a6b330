"""``make chaos``: a storm of faults on a fleet of real processes, and how soon it recovers.

Ends with one line of JSON; the exit code is 1 when something was lost, doubled or stuck.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from chaos.crash_points import POINTS
from chaos.fleet import Plan, with_mutant
from chaos.mutants import MUTANTS
from chaos.points import sweep
from chaos.recovery import recoveries
from chaos.run import Outcome, replay, storm

from vecfleet.fleet.redis_server import find_redis_server

_ROUND_S = 120.0  # of one storm: then the oracle looks, and a new fleet begins
_RECOVERY_SHARE = 0.2
_KILL_TAKES_S = 15.0
_FLEETS = 4
_MOST_RECOVERIES = 60


def _say(text: str) -> None:
    print(text, flush=True)


def _shown(name: str, outcome: Outcome) -> None:
    _say(
        f"{name}: {sum(outcome.kills.values())} kills, {sum(outcome.faults.values())} faults, "
        f"{outcome.acknowledged} acknowledged, {outcome.documents} documents, "
        f"{outcome.dead} in the dead letter, lost {outcome.lost}, doubled {outcome.doubled}, "
        f"stuck {outcome.stuck}, {outcome.seconds:.0f} s"
        + (f"; full disk: {outcome.disk_kind}" if outcome.disk_kind else "")
    )


def run(given: argparse.Namespace, folder: Path) -> Outcome:
    """All that was asked for."""
    total = Outcome()
    isolated = given.recovery
    if isolated is None:
        fits = given.duration * _RECOVERY_SHARE / _KILL_TAKES_S * _FLEETS
        isolated = min(_MOST_RECOVERIES, int(fits))
    left_s = given.duration - isolated * _KILL_TAKES_S / _FLEETS
    seed, number = given.seed, 0
    if given.points:
        outcome = sweep(folder / "points", seed=seed, times=given.points)
        _shown(f"crash points, {given.points} times each", outcome)
        _finish(total, outcome, f"--points {given.points} --duration 0 --recovery 0", seed)
    while left_s > 1.0 and total.is_kept:
        duration_s = min(left_s, _ROUND_S)
        # Where Redis may lose what it accepted, a client counts on what is done.
        until = "accepted" if given.redis == "always" else "done"
        plan = Plan(
            seed=seed,
            small_disk=True,
            lease_s=given.lease,
            persistence=given.redis,
            until=until,
        )
        if given.mutant:
            plan = with_mutant(plan, given.mutant)
        began = time.monotonic()
        outcome = storm(folder / f"storm{number}", plan, duration_s=duration_s, gap_s=given.gap)
        left_s -= max(time.monotonic() - began, 1.0)
        _shown(f"storm of seed {seed}", outcome)
        mutant = f" --redis {given.redis}" + (f" --mutant {given.mutant}" if given.mutant else "")
        _finish(total, outcome, f"--duration {duration_s:.0f} --recovery 0{mutant}", seed)
        if outcome.is_kept and not given.keep:
            shutil.rmtree(folder / f"storm{number}", ignore_errors=True)
        seed, number = seed + 1, number + 1
    if isolated and total.is_kept:
        outcome = recoveries(folder / "recovery", count=isolated, seed=given.seed, fleets=_FLEETS)
        _shown(f"{isolated} isolated kills at production leases", outcome)
        _finish(total, outcome, f"--duration 0 --recovery {isolated}", given.seed)
    return total


def _finish(total: Outcome, outcome: Outcome, options: str, seed: int) -> None:
    if not outcome.is_kept:
        for failure in outcome.failures:
            _say(failure)
        _say(f"FAILED with seed {seed}; again: {replay(options, seed)}")
    total.add(outcome)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--duration", type=float, default=1800.0, help="seconds in all")
    parser.add_argument("--seed", type=int, help="by default one that is drawn, and told")
    parser.add_argument("--gap", type=float, default=0.25, help="mean seconds between faults")
    parser.add_argument("--lease", type=float, default=1.0, help="seconds, in storms")
    parser.add_argument(
        "--redis",
        default="always",
        choices=["always", "everysec", "none"],
        help="how it keeps its data in storms; with everysec a kill is a power cut",
    )
    parser.add_argument("--recovery", type=int, help="isolated kills at production leases")
    parser.add_argument("--points", type=int, default=0, help="kills at each crash point")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="plant a defect in storms")
    parser.add_argument("--keep", metavar="FOLDER", help="keep logs, ledgers and data here")
    given = parser.parse_args()
    if given.seed is None:
        given.seed = random.SystemRandom().randrange(1_000_000)
    folder = Path(given.keep or tempfile.mkdtemp(prefix="vecfleet-chaos-"))
    _say(f"seed {given.seed}, {len(POINTS)} crash points, in {folder}")
    cores = len(os.sched_getaffinity(0))
    python = platform.python_version()
    _say(f"{cores} cores, Python {python}, {find_redis_server()}")
    total = run(given, folder)
    by_role = ", ".join(f"{role} {n}" for role, n in sorted(total.kills.items()))
    by_kind = ", ".join(f"{kind} {n}" for kind, n in sorted(total.faults.items()))
    _say(f"kills: {by_role}\nfaults: {by_kind}")
    _say(f"at crash points: {', '.join(f'{p} {n}' for p, n in sorted(total.fired.items()))}")
    if total.is_kept and not given.keep:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(total.to_json()))
    return 0 if total.is_kept else 1


if __name__ == "__main__":
    sys.exit(main())
