"""``make chaos``: faults on fleets of real processes, what became of them, and how soon.

Ends with one line of JSON; the exit code is 1 when something was lost, doubled or stuck, when the
recovery took too long, or when nothing was shown.
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
import traceback
from pathlib import Path

from chaos.agenda import Agenda, Wanted, not_shown
from chaos.crash_points import POINTS
from chaos.mutants import MUTANTS
from chaos.outcome import Outcome
from chaos.parts import Part

from vecfleet.fleet.redis_server import find_redis_server


def _say(text: str) -> None:
    print(text, flush=True)


class Run:
    """Parts, one after the other, until one fails."""

    def __init__(self, folder: Path, *, keep: bool = False) -> None:
        self.total = Outcome()
        self.done: list[Part] = []
        self._folder = folder
        self._keep = keep

    def do(self, part: Part) -> float:
        """Run a part, unless one has failed; the seconds that it took."""
        if not self.total.is_kept:
            return 0.0
        began = time.monotonic()
        folder = self._folder / f"{len(self.done)}-{part.kind}"
        try:
            outcome = part.run(folder)
        except Exception:
            outcome = Outcome(failures=[f"the run broke off:\n{traceback.format_exc()}"])
        _say(f"{part}: {outcome}")
        if not outcome.is_kept:
            for failure in outcome.failures:
                _say(failure)
            _say(f"FAILED; again: {part.command}")
        elif not self._keep:
            shutil.rmtree(folder, ignore_errors=True)
        self.total.add(outcome)
        self.done.append(part)
        return time.monotonic() - began

    def all_of(self, agenda: Agenda) -> None:
        """Everything that there is time for."""
        for part in agenda.first():
            seconds = self.do(part)
            if part.kind == "storm":  # the others' time was put aside
                agenda.took(seconds)
        while self.total.is_kept and (storm := agenda.next_storm()):
            agenda.took(self.do(storm))
        for part in agenda.last():
            self.do(part)

    def close(self) -> int:
        """Tell what it came to; the exit code."""
        total = self.total
        if not total.kills:
            total.failures.append("nobody was killed")
            _say("FAILED: nobody was killed, so nothing was shown")
        if total.is_late:
            _say("FAILED: the recovery's p99 misses its target")
        _say(f"kills: {_counts(total.kills)}\nfaults: {_counts(total.faults)}")
        _say(f"at crash points: {_counts(total.fired)}")
        if total.asked:
            _say(f"calls that waited: {_counts(total.asked)}")
        if total.full_windows:
            told = ", ".join(f"{claims} claims {s:.1f} s" for claims, s in total.full_windows)
            _say(f"full windows, until the last claim was settled: {told}")
        for line in not_shown(self.done, total):
            _say(f"not reached: {line}")
        print(json.dumps(total.to_json()))
        return 0 if total.is_kept else 1


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "none"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--duration", type=float, default=1800.0, help="seconds in all")
    parser.add_argument("--seed", type=int, help="by default one that is drawn, and told")
    parser.add_argument("--gap", type=float, default=0.25, help="mean seconds between faults")
    parser.add_argument("--lease", type=float, default=1.0, help="seconds, in storms")
    parser.add_argument(
        "--redis",
        choices=["always", "everysec", "none"],
        help="how it keeps its data in storms; with everysec a kill is a power cut",
    )
    parser.add_argument("--points", type=int, help="deaths at each crash point")
    parser.add_argument("--recovery", type=int, help="isolated kills at production leases")
    parser.add_argument("--full", type=int, help="kills of workers whose window is full")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="plant a defect in storms")
    parser.add_argument("--keep", metavar="FOLDER", help="keep logs, ledgers and data here")
    parser.add_argument("--replay", type=Part.of, metavar="PART", help="one part, as it was told")
    given = parser.parse_args()
    if given.seed is None:
        given.seed = random.SystemRandom().randrange(1_000_000)
    return given


def main() -> int:
    """The command line."""
    given = _arguments()
    folder = Path(given.keep or tempfile.mkdtemp(prefix="vecfleet-chaos-"))
    _say(f"seed {given.seed}, {len(POINTS)} crash points, in {folder}")
    cores = len(os.sched_getaffinity(0))
    _say(f"{cores} cores, Python {platform.python_version()}, {find_redis_server()}")
    run = Run(folder, keep=bool(given.keep))
    if given.replay:
        run.do(given.replay)
    else:
        wanted = Wanted(
            given.duration,
            given.seed,
            gap_s=given.gap,
            lease_s=given.lease,
            redis=given.redis,
            mutant=given.mutant or "",
            points=given.points,
            recovery=given.recovery,
            full=given.full,
        )
        run.all_of(Agenda(wanted))
    code = run.close()
    if code == 0 and not given.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
