"""``make fuzz``: HTTP cases against a live fleet, damage to stored files, one line of JSON.

python -m fuzz [--seed N] [--cases N] [--corruptions N] [--only http|corruption|hypothesis]
python -m fuzz share SEED FIRST LAST STEP      (one process's share of the corruptions)
python -m fuzz replay SEED CASE                (one corruption again)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from fuzz.corruption import Subjects
from fuzz.fleet import live_fleet
from fuzz.http_run import run_http, say
from fuzz.keys import make_keys
from fuzz.parallel import Corruptions, run_corruptions, run_share
from fuzz.properties import run_properties
from fuzz.requests_run import Tally, keep_failures

BUILD = Path("build/fuzz")


def main() -> int:
    """0 when every target is met."""
    if sys.argv[1:2] == ["share"]:
        run_share(*map(int, sys.argv[2:6]))
        return 0
    if sys.argv[1:2] == ["replay"]:
        with tempfile.TemporaryDirectory() as folder:
            print(Subjects(Path(folder)).run(sys.argv[2], int(sys.argv[3])))
        return 0
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--corruptions", type=int, default=10_000)
    parser.add_argument("--only", choices=("http", "corruption", "hypothesis"))
    asked = parser.parse_args()
    say(f"seed {asked.seed}")
    tally, corruptions = Tally(), Corruptions()
    if asked.only in (None, "hypothesis"):
        run_properties(asked.seed, tally)
    if asked.only in (None, "http"):
        _run_http(asked.cases, asked.seed, tally)
    if asked.only in (None, "corruption"):
        corruptions = run_corruptions(asked.seed, asked.corruptions, os.cpu_count() or 1)
        say(f"{corruptions.cases} corruptions, {dict(corruptions.verdicts)}")
    for failure in tally.failures[:20] + corruptions.undetected[:20]:
        say(failure)
    keep_failures(tally, BUILD)
    if tally.failures or corruptions.undetected:
        say(f"replay: make fuzz SEED={asked.seed}, or python -m fuzz replay {asked.seed} CASE")
    figures = {
        "cases": tally.cases,
        "status_5xx": tally.seen_5xx,
        "corruptions": corruptions.cases,
        "undetected": len(corruptions.undetected),
    }
    print(json.dumps(figures), flush=True)
    complete = (asked.only not in (None, "http") or tally.cases >= asked.cases) and (
        asked.only not in (None, "corruption") or corruptions.cases >= asked.corruptions
    )
    return 0 if complete and not tally.failures and not corruptions.undetected else 1


def _run_http(cases: int, seed: int, tally: Tally) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keyring = make_keys(folder / "keys.json")
        with live_fleet(folder, folder / "keys.json") as fleet:
            try:
                asyncio.run(run_http(fleet, keyring, cases, seed, tally))
            except Exception as error:
                tally.failures.append(f"the run broke off: {error!r}")
                keep_failures(tally, BUILD)
                fleet.keep_logs(BUILD)


if __name__ == "__main__":
    sys.exit(main())
