"""The numbers that workers publish about their engine, as Redis holds them."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import redis.asyncio

from vecfleet.common import keys

_POLL_S = 0.02


async def worker_status(client: redis.asyncio.Redis) -> dict[str, float]:
    """The numbers in the worker's last heartbeat."""
    status: dict[str, float] = {}
    async for key in client.scan_iter(f"{keys.worker('worker')}*"):
        for name, value in cast(Any, await cast(Any, client.hgetall(key))).items():
            try:
                status[name.decode()] = float(value)
            except ValueError:
                continue
    return status


async def fresh_worker_status(client: redis.asyncio.Redis, name: str) -> dict[str, float]:
    """The worker's status just after its counter ``name`` has changed."""
    before = (await worker_status(client))[name]
    while True:
        status = await worker_status(client)
        if status[name] != before:
            return status
        await asyncio.sleep(_POLL_S)
