"""The right to write one home's index: one holder at a time, and a token that only grows.

The lease in Redis keeps two aggregators from working on one directory; the token, checked inside
every commit of a manifest, keeps one that lost its lease without noticing from publishing.

A holder that died leaves its lease behind. Who can see that it died, because both have their
process numbers from the same kernel and the same PID namespace, takes it at once; all others, also
this machine after it was started anew, wait until it runs out.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from pathlib import Path
from typing import Any, cast

import redis

from vecfleet.common import keys
from vecfleet.common.errors import RedisUnavailable, StaleWriter
from vecfleet.common.redis_client import read_lua, translated

log = logging.getLogger(__name__)

_PROC = Path("/proc")
_HOLDER = re.compile(r"(?P<host>.+):(?P<pid>[0-9]{1,9}):(?P<started>[0-9]+)@(?P<place>.+)")


class WriterLease:
    """Held from ``acquire`` to ``release``."""

    def __init__(self, client: redis.Redis, home: str, *, ttl_s: float = keys.LEASE_TTL_S) -> None:
        self._redis = client
        self._key = keys.writer(home)
        self._ttl_ms = int(ttl_s * 1000)
        self._holder = _this_process()
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
                found = cast(Any, self._redis.get(self._key))
            holder = None if found is None else found.decode(errors="replace")
            if holder is not None and _is_dead(holder):
                with translated():
                    self._do("remove", holder)
                continue
            if not told and holder is not None:
                log.warning("waiting: %s holds this index", holder.partition("@")[0])
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


def _this_process() -> str:
    """``host:pid:started@place``; without a place where nobody can see whether it lives."""
    name, pid = socket.gethostname(), os.getpid()
    try:
        return f"{name}:{pid}:{_started(pid)}@{_place()}"
    except OSError:
        return f"{name}:{pid}"


def _is_dead(holder: str) -> bool:
    """Whether the holder was a process that would be seen here, and no longer exists."""
    found = _HOLDER.fullmatch(holder)
    try:
        if found is None or (found["host"], found["place"]) != (socket.gethostname(), _place()):
            return False
        os.kill(int(found["pid"]), 0)  # it sees those whom /proc may hide
        return _started(int(found["pid"])) != found["started"]
    except ProcessLookupError:
        return True
    except OSError:  # another user's, hidden, or no file can be opened now
        return False


def _place() -> str:
    """Where process numbers mean the same: this kernel since it booted, and the PID namespace.

    Raises ``OSError`` where that cannot be told: off Linux, or with a /proc of another namespace.
    """
    if str((_PROC / "self").readlink()) != str(os.getpid()):
        raise OSError("this /proc has other process numbers")
    boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{(_PROC / 'self/ns/pid').stat().st_ino}"


def _started(pid: int) -> str:
    """When a process began, in clock ticks since boot; tells a reused pid apart."""
    stat = (_PROC / str(pid) / "stat").read_text()
    return stat.rpartition(")")[2].split()[19]
