"""The same requests while the fleet behind the gateway, or Redis itself, is away."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fuzz.contract import Contract
from fuzz.corpus import Request
from fuzz.fleet import LiveFleet
from fuzz.requests_run import Tally, send_all
from fuzz.stories import Client, still_serves


async def without_the_fleet(
    fleet: LiveFleet, contract: Contract, requests: Sequence[Request], tally: Tally
) -> None:
    """Worker and aggregator stop: 503 and 504 are right now, and nothing else of the fives."""
    for role in ("worker", "aggregator"):
        await asyncio.to_thread(fleet.roles.pop(role).stop)
    await send_all(fleet.port, contract, requests, tally, away=True)
    await asyncio.to_thread(fleet.start_aggregator)
    await asyncio.to_thread(fleet.start_worker)
    await _back(fleet, contract)


async def without_redis(
    fleet: LiveFleet, contract: Contract, requests: Sequence[Request], tally: Tally
) -> None:
    """Redis stops and comes back empty; the gateway answers all the while."""
    await asyncio.to_thread(fleet.redis.stop)
    await send_all(fleet.port, contract, requests, tally, away=True)
    await asyncio.to_thread(fleet.redis.start)
    await _back(fleet, contract)


async def _back(fleet: LiveFleet, contract: Contract, deadline_s: float = 60.0) -> None:
    """Wait until the fleet serves again."""
    client = Client(fleet.port, contract, Tally())
    async with asyncio.timeout(deadline_s):
        while True:
            try:
                await still_serves(client)
                break
            except AssertionError:
                await asyncio.sleep(0.2)
    client.close()
