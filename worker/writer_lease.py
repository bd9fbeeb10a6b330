"""The right to write one home's index: one holder at a time, and a token that only grows.

The lease in Redis keeps two aggregators from working on one directory; the token, checked inside
every commit of a manifest, keeps one that lost its lease without noticing from publishing.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from pathlib import Path
from typing import Any, cast

import redis

from vecfleet.common import keys
from vecfleet.common.errors import RedisUnavailable, StaleWriter, Unavailable
from vecfleet.common.redis_client import read_lua, translated

log = logging.getLogger(__name__)

_PROC = Path("/proc")


class WriterLease:
    """Held from ``acquire`` to ``release``."""

    def __init__(self, client: redis.Redis, home: str, *, ttl_s: float = keys.LEASE_TTL_S) -> None:
        self._redis = client
        self._key = keys.writer(home)
        self._ttl_ms = int(ttl_s * 1000)
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"
        self._script = client.register_script(read_lua(Path(__file__).parent, "writer_lease"))
        self.token = 0

    def acquire(self, stop: threading.Event) -> bool:
        """Wait for the lease and its token; False when ``stop`` came first."""
        told = False
        while not stop.is_set():
            with translated():
                if token := self._do("take"):
                    # Microseconds of Redis TIME: greater than that of any lease taken before.
                    self.token = token
                    return True
                holder = cast(Any, self._redis.get(self._key))
            if holder is not None and self._is_dead(holder.decode()):
                with translated():
                    self._do("remove", holder.decode())
                continue
            if not told and holder is not None:
                log.warning("waiting: %s holds this index", holder.decode())
                told = True
            stop.wait(0.5)
        return False

    def _do(self, action: str, holder: str = "") -> int:
        names = [self._key, f"{self._key}:none"]
        return int(self._script(keys=names, args=[action, holder or self._holder, self._ttl_ms]))

    def renew(self) -> None:
        """Keep the lease; raises ``StaleWriter`` when another has taken it."""
        with translated():
            # Redis may have come back without its data; then the lease is free to take again.
            if self._do("renew") or self._do("take"):
                return
        raise StaleWriter()

    def release(self) -> None:
        """Give the lease back, if it is still ours."""
        try:
            with translated():
                self._do("remove")
        except RedisUnavailable as error:
            log.warning("the writer's lease runs out by itself: %s", error)

    def _is_dead(self, holder: str) -> bool:
        """Whether the holder was a process of this machine that no longer exists."""
        host, pid, started = holder.rsplit(":", 2)
        if host != socket.gethostname() or not pid.isdigit():
            return False
        try:
            return _started(int(pid)) != started
        except Unavailable:
            return True


def _started(pid: int) -> str:
    """When a process began, in clock ticks since boot; tells a reused pid apart."""
    if not _PROC.is_dir():
        return "?"  # not Linux: a dead holder's lease runs out by itself
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
    except OSError as error:
        raise Unavailable(f"there is no process {pid}") from error
    return stat.rpartition(")")[2].split()[19]
