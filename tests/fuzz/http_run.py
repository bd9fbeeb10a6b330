"""All HTTP cases of one run, against two gateways of one fleet: one asks for keys, one does not."""

from __future__ import annotations

import asyncio
import os
import random
import sys

from fuzz.contract import Contract
from fuzz.fleet import LiveFleet
from fuzz.keys import Keyring
from fuzz.links import declared_links, follow_links
from fuzz.outage import without_redis, without_the_fleet
from fuzz.requests_run import Tally, build_corpus, send_all, stream
from fuzz.sockets import all_raw, slow_clients
from fuzz.stories import (
    Client,
    check_rival,
    get_document,
    prepare,
    queries,
    settle_rival,
    still_serves,
    story,
)

GENERATED = 0.1  # of the HTTP cases come from schemathesis itself, most others are made from these
LINKED = 0.1  # follow the document's links
RAW = 0.02  # go to the socket as bytes
OUTAGE = 200  # cases while something is away: many of them wait for an answer
STORIES = 100
TOLD_AT_ONCE = 4  # at each door
STORY_CASES = 60  # at the two doors it takes at least so many requests
MANY = 100_000  # cases after which every link must have been followed
MOST_GROWTH_MB = 256.0  # of one role's memory in the second half


async def run_http(
    fleet: LiveFleet,
    keyring: Keyring,
    cases: int,
    seed: int,
    tally: Tally,
    *,
    outages: bool = True,
) -> Contract:
    """All HTTP cases; what is wrong is in the tally."""
    document = await get_document(fleet.port)
    contract = Contract(document)
    await get_document(fleet.keyed_port, keyring.mine)
    open_door = Client(fleet.port, contract, tally)
    mine = Client(fleet.keyed_port, contract, tally, keyring.mine, keyring)
    rival = Client(fleet.keyed_port, contract, tally, keyring.rival)
    for client in (open_door, mine):
        await prepare(client)
        await queries(client)
    await open_door.ask("GET", "/metrics")
    await settle_rival(rival, keyring)
    stories = min(STORIES, cases // 200) + 1
    raw, linked = int(cases * RAW), int(cases * LINKED)
    away = min(OUTAGE, cases // 50) * outages
    left = cases - raw - linked - 2 * away - stories * STORY_CASES
    wanted = min(max(int(cases * GENERATED), 100), 20_000)
    corpus = await asyncio.to_thread(build_corpus, document, wanted, seed, os.cpu_count() or 1)
    say(f"{len(corpus)} requests from the OpenAPI document")

    async def both_doors(total: int, seed: int) -> None:
        keyed = keyring.sent(stream(corpus, total // 2, seed + 1), seed)
        await asyncio.gather(
            send_all(fleet.port, contract, stream(corpus, total - total // 2, seed), tally),
            send_all(fleet.keyed_port, contract, keyed, tally, keyring=keyring),
        )

    await both_doors(left // 2, seed)
    before = fleet.rss_mb()
    await both_doors(left - left // 2, seed + 2)
    say(f"{tally.cases} cases, {dict(sorted(tally.statuses.items()))}")
    await _follow(fleet, contract, keyring, linked, seed, tally)
    closed = tally.closed
    await asyncio.gather(
        all_raw(fleet.port, random.Random(seed), raw, tally), slow_clients(fleet.port, 20, tally)
    )
    say(f"{tally.closed - closed} connections that sent no HTTP were closed, and {closed} others")
    for first in range(0, stories, TOLD_AT_ONCE):
        names = [f"story-{n}" for n in range(first, min(first + TOLD_AT_ONCE, stories))]
        doors = [Client(fleet.port, contract, tally) for _ in names]
        doors += [Client(fleet.keyed_port, contract, tally, keyring.mine, keyring) for _ in names]
        await asyncio.gather(
            *(story(door, name, tally) for door, name in zip(doors, names * 2, strict=True))
        )
    await still_serves(mine)
    await still_serves(open_door)
    await check_rival(rival, keyring)
    for client in (mine, rival, open_door):
        client.close()
    _look_at(fleet, before, tally)
    tally.failures += [
        f"{label} was never answered with a 2xx" for label in contract.never_served()
    ]
    if outages:
        some_of = random.Random(seed).sample(corpus, min(away, len(corpus)))
        await without_the_fleet(fleet, contract, some_of, tally)
        await without_redis(fleet, contract, some_of, tally)
        fleet.check_alive()
    return contract


async def _follow(
    fleet: LiveFleet, contract: Contract, keyring: Keyring, cases: int, seed: int, tally: Tally
) -> None:
    followed = await follow_links(
        fleet.keyed_port, contract, keyring, cases, seed, os.cpu_count() or 1
    )
    tally.add(followed.tally)
    contract.served += followed.served
    links = declared_links(contract.document)
    missed = sorted(links - followed.links.keys())
    say(
        f"{followed.tally.cases} requests followed {len(links) - len(missed)} of {len(links)} links"
        f" {sum(followed.links.values())} times; {dict(sorted(followed.tally.statuses.items()))}"
    )
    if cases >= MANY * LINKED:
        tally.failures += [f"the link {name} was never followed" for name in missed]


def _look_at(fleet: LiveFleet, before: dict[str, float], tally: Tally) -> None:
    fleet.check_alive()
    for role, now in fleet.rss_mb().items():
        say(f"{role}: {before[role]:.0f} MB half way, {now:.0f} MB at the end")
        if now - before[role] > MOST_GROWTH_MB:
            tally.failures.append(f"{role} grew from {before[role]:.0f} to {now:.0f} MB")
    if log := fleet.log_of_failure():
        tally.failures.append(f"a gateway's log tells of failures:\n{log[:3000]}")


def say(line: str) -> None:
    """Progress, for a person who waits."""
    print(line, file=sys.stderr, flush=True)
