"""Which of this host's processes are at work, as Redis knows it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any, cast

from vecfleet.common.errors import VecfleetError
from vecfleet.common.redis_client import connect, translated
from vecfleet.fleet.supervisor import Supervisor

_LOOK_S = 0.1


def workers_here(redis_url: str) -> dict[int, str]:
    """The workers of this host that show themselves, name by process id.

    A worker that died stays for as long as its entry in Redis lives, a minute at most.
    Raises ``RedisUnavailable``.
    """
    host = socket.gethostname().encode()
    found: dict[int, str] = {}
    with contextlib.closing(connect(redis_url)) as client, translated():
        for key in cast(Any, client.smembers("rq:workers")):
            pid, where = cast(Any, client.hmget(key, "pid", "hostname"))
            if pid is not None and where == host:
                found[int(pid)] = key.decode().removeprefix("rq:worker:")
    return found


async def note_ready(supervisor: Supervisor, redis_url: str) -> None:
    """For ever: tell ``supervisor`` of its children that show themselves in Redis."""
    while True:
        if supervisor.not_ready():
            with contextlib.suppress(VecfleetError):  # Redis is away: nobody can be ready
                supervisor.ready(await asyncio.to_thread(workers_here, redis_url))
        await asyncio.sleep(_LOOK_S)
