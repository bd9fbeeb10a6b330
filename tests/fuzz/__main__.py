"""``make fuzz``: HTTP cases against a live fleet, damage to stored files, one line of JSON.

python -m fuzz [--seed N] [--cases N] [--corruptions N] [--only http|corruption]
python -m fuzz share SEED FIRST LAST STEP      (one process's share of the corruptions)
python -m fuzz replay SEED CASE                (one corruption again)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from fuzz.contract import Contract
from fuzz.corruption import Subjects
from fuzz.fleet import LiveFleet, live_fleet
from fuzz.outage import without_redis, without_the_fleet
from fuzz.parallel import Corruptions, run_corruptions, run_share
from fuzz.requests_run import (
    Tally,
    build_corpus,
    get_document,
    keep_failures,
    prepare,
    send_all,
    still_serves,
    story,
    stream,
)
from fuzz.sockets import all_raw, slow_clients

BUILD = Path("build/fuzz")
GENERATED = 0.1  # of the HTTP cases come from schemathesis itself, the others are made from these
RAW = 0.02  # go to the socket as bytes
OUTAGE = 200  # cases while something is away: many of them wait for an answer
STORIES = 200
MOST_GROWTH_MB = 256.0  # of one role's memory over the whole run


async def run_http(
    fleet: LiveFleet, cases: int, seed: int, tally: Tally, *, outages: bool = True
) -> None:
    """All HTTP cases; what is wrong is in the tally."""
    await prepare(fleet.port)
    document = await get_document(fleet.port)
    contract = Contract(document)
    wanted = min(max(int(cases * GENERATED), 100), 20_000)
    corpus = await asyncio.to_thread(build_corpus, document, wanted, seed, os.cpu_count() or 1)
    say(f"{len(corpus)} requests from the OpenAPI document")
    generator = random.Random(seed)
    raw = int(cases * RAW)
    left = cases - raw - 2 * min(OUTAGE, cases // 50) * outages - min(STORIES, cases // 100) * 10
    await send_all(fleet.port, contract, stream(corpus, left // 2, seed), tally)
    before = fleet.rss_mb()
    await send_all(fleet.port, contract, stream(corpus, left - left // 2, seed + 1), tally)
    say(f"{tally.cases} cases, {dict(sorted(tally.statuses.items()))}")
    await asyncio.gather(
        all_raw(fleet.port, generator, raw, tally), slow_clients(fleet.port, 20, tally)
    )
    for number in range(0, min(STORIES, cases // 100), 8):
        names = [f"story-{number + n}" for n in range(8)]
        await asyncio.gather(*(story(fleet.port, name, tally) for name in names))
    await still_serves(fleet.port)
    fleet.check_alive()
    for role, now in fleet.rss_mb().items():
        say(f"{role}: {before[role]:.0f} MB half way, {now:.0f} MB at the end")
        if now - before[role] > MOST_GROWTH_MB:
            tally.failures.append(f"{role} grew from {before[role]:.0f} to {now:.0f} MB")
    if log := fleet.log_of_failure():
        tally.failures.append(f"the gateway's log tells of failures:\n{log[:3000]}")
    if not outages:
        return
    away = generator.sample(corpus, min(OUTAGE, cases // 50, len(corpus)))
    await without_the_fleet(fleet, contract, away, tally)
    await without_redis(fleet, contract, away, tally)
    fleet.check_alive()


def say(line: str) -> None:
    """Progress, for a person who waits."""
    print(line, file=sys.stderr, flush=True)


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
    parser.add_argument("--only", choices=("http", "corruption"))
    asked = parser.parse_args()
    say(f"seed {asked.seed}")
    tally, corruptions = Tally(), Corruptions()
    if asked.only != "corruption":
        with tempfile.TemporaryDirectory() as folder, live_fleet(Path(folder)) as fleet:
            try:
                asyncio.run(run_http(fleet, asked.cases, asked.seed, tally))
            except Exception as error:
                tally.failures.append(f"the run broke off: {error!r}")
                keep_failures(tally, BUILD)
                fleet.keep_logs(BUILD)
    if asked.only != "http":
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
    complete = (asked.only == "corruption" or tally.cases >= asked.cases) and (
        asked.only == "http" or corruptions.cases >= asked.corruptions
    )
    return 0 if complete and not tally.failures and not corruptions.undetected else 1


if __name__ == "__main__":
    sys.exit(main())
