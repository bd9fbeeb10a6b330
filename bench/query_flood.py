"""One tenant asks ten times what the fleet can do: what another one notices of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

from vecfleet.bench import http_client
from vecfleet.bench.http_client import Connection

TIMES_CAPACITY = 10
CROWD_TEXTS = 32  # of one call
_CONNECTIONS = 256  # more than can wait for an answer at a time
_PAUSE_S = 0.02


@dataclass(slots=True)
class QueryFlood:
    """What one run has seen."""

    statuses: Counter[str] = field(default_factory=Counter)  # the crowd's
    accepted_s: list[float] = field(default_factory=list)  # the crowd's
    refused_s: list[float] = field(default_factory=list)
    guest_s: list[float] = field(default_factory=list)
    guest_failed: int = 0


async def flood_queries(
    address: tuple[str, int],
    crowd: str,
    guest: str,
    *,
    text: str,
    texts_per_s: float,
    duration_s: float,
) -> QueryFlood:
    """Ask with both keys; ``texts_per_s`` is what the fleet can do."""
    seen = QueryFlood()
    ends = time.monotonic() + duration_s
    pause_s = _CONNECTIONS * CROWD_TEXTS / (TIMES_CAPACITY * texts_per_s)
    crowd_headers = {"authorization": f"Bearer {crowd}"}

    async def press(connection: Connection, due: float) -> None:
        number = 0
        while due < ends:
            await asyncio.sleep(due - time.monotonic())
            due = max(due + pause_s, time.monotonic())
            number += 1
            texts = [f"{number} {n} {text}" for n in range(CROWD_TEXTS)]
            request = http_client.embeddings_request(texts, crowd_headers)
            answer = await connection.ask(request)
            seen.statuses[str(answer.status)] += 1
            if answer.status == 429:
                seen.refused_s.append(answer.seconds)
            elif answer.status == 200:
                seen.accepted_s.append(answer.seconds)

    async def ask(connection: Connection) -> None:
        headers = {"authorization": f"Bearer {guest}"}
        while time.monotonic() < ends:
            question = f"a question {len(seen.guest_s)}"
            answer = await connection.ask(http_client.embeddings_request([question], headers))
            if answer.status == 200:
                seen.guest_s.append(answer.seconds)
            else:
                seen.guest_failed += 1
            await asyncio.sleep(_PAUSE_S)

    connections = [await Connection.open(address) for _ in range(_CONNECTIONS + 1)]
    now = time.monotonic()
    try:
        await asyncio.gather(
            ask(connections[-1]),
            *(
                press(connection, now + n * pause_s / _CONNECTIONS)
                for n, connection in enumerate(connections[:-1])
            ),
        )
    finally:
        for connection in connections:
            connection.close()
    return seen
