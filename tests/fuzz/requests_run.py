"""Many requests at once against a live fleet; every answer is held against the contract."""

from __future__ import annotations

import asyncio
import base64
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.contract import Broken, Contract
from fuzz.corpus import Request, generate, spread
from fuzz.keys import Keyring
from fuzz.mutations import mutated
from fuzz.wire import Answer, Connection, request_bytes

CLIENTS = 24
JSON = {"content-type": "application/json"}


@dataclass
class Tally:
    """What was sent and what came back."""

    cases: int = 0
    closed: int = 0  # connections that ended without an answer
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seen_5xx: int = 0

    def count(self, answer: Answer, *, away: bool = False) -> None:
        """One more answer."""
        self.cases += 1
        self.statuses[answer.status] += 1
        self.closed += answer.status == 0
        self.seen_5xx += answer.status >= 500 and not (away and answer.status in (503, 504))

    def add(self, other: Tally) -> None:
        """What another process has counted."""
        self.cases += other.cases
        self.closed += other.closed
        self.statuses += other.statuses
        self.failures += other.failures
        self.seen_5xx += other.seen_5xx


def build_corpus(document: dict[str, Any], total: int, seed: int, workers: int) -> list[Request]:
    """About ``total`` requests by schemathesis, made by several processes."""
    plan = list(spread(total, document))
    if workers < 2:
        made = [generate(document, label, count, seed) for label, count in plan]
        return [request for some in made for request in some]
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(generate, document, label, count, seed) for label, count in plan]
        return [request for job in jobs for request in job.result()]


def stream(corpus: Sequence[Request], total: int, seed: int) -> Iterator[Request]:
    """The corpus in a shuffled order, then mutations of it, ``total`` requests in all."""
    generator = random.Random(seed)
    order = list(corpus)
    generator.shuffle(order)
    yield from order[:total]
    for _ in range(total - len(order)):
        yield mutated(generator.choice(corpus), generator, corpus)


async def send_all(
    port: int,
    contract: Contract,
    requests: Iterable[Request],
    tally: Tally,
    *,
    away: bool = False,
    keyring: Keyring | None = None,
) -> None:
    """Send all of ``requests`` over ``CLIENTS`` connections and check the answers."""
    source = iter(requests)

    async def client() -> None:
        connection = Connection(port)
        for request in source:
            await check_one(connection, contract, request, tally, away=away, keyring=keyring)
        connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(client())


async def check_one(
    connection: Connection,
    contract: Contract,
    request: Request,
    tally: Tally,
    *,
    away: bool = False,
    keyring: Keyring | None = None,
) -> Answer:
    """Send one request; what breaks the contract is kept in the tally with what replays it.

    ``keyring``: keys are asked for, and nobody sees what is the rival's.
    """
    raw = request_bytes(request.method, request.target, request.headers, request.body)
    try:
        answer = await connection.exchange(raw)
    except TimeoutError:
        tally.failures.append(told(request, raw, "no answer within 60 s"))
        return Answer()
    tally.count(answer, away=away)
    try:
        contract.check(request.method, request.target, answer, key=request.key, away=away)
        if (
            keyring is not None
            and request.key != keyring.rival
            and (secret := keyring.leaked(request, answer))
        ):
            raise Broken(f"it shows {secret!r} of the rival's: {answer.body[:300]!r}")
    except Broken as fault:
        tally.failures.append(told(request, raw, str(fault)))
    return answer


def told(request: Request, raw: bytes, fault: str) -> str:
    """A failure with the bytes that replay it."""
    shown = base64.b64encode(raw).decode() if len(raw) < 20_000 else f"({len(raw)} bytes)"
    return f"{request.method} {request.target[:120]} ({request.origin}): {fault}\n  replay: {shown}"


def keep_failures(tally: Tally, folder: Path, most: int = 20) -> None:
    """Write the first failures down for a person to look at."""
    if tally.failures:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failures.txt").write_text("\n\n".join(tally.failures[:most]) + "\n")
