"""Which of this host's processes are at work, as Redis knows it."""

from __future__ import annotations

import contextlib
import socket
from typing import Any, cast

from vecfleet.common.redis_client import connect, translated


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
