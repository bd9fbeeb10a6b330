"""What RQ's tools are shown of a worker: that it is there, its queues, and what it has done."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import redis

from vecfleet.common import keys
from vecfleet.common.queue_client import client_scripts
from vecfleet.common.redis_client import read_lua, translated
from vecfleet.worker.known_queues import KnownQueues, by_name, in_parts, lines_of

log = logging.getLogger(__name__)

_RQ_VERSION = "2.12"
_SWEEPER_MS = 9_000  # a little less than from one sweep to the next


class Roster:
    """One worker in RQ's registries. Thread-safe: what it remembers is for people only."""

    def __init__(self, client: redis.Redis, worker: str) -> None:
        self._redis = client
        self._known = KnownQueues(client)
        self._prune = client.register_script(read_lua(Path(__file__).parent, "prune"))
        self._sweep = client.register_script(read_lua(Path(__file__).parent, "sweep"))
        self._shown: list[str] = []  # the queues in which it was shown last
        self.worker = worker

    def register(self, queues: Sequence[keys.QueueName]) -> None:
        """Show this worker to RQ's tools; on a full Redis, only its heartbeat will."""
        key = f"rq:worker:{self.worker}"
        now = rq_time()
        queues = by_name(queues)
        about: dict[str, str | int | float] = {
            "birth": now,
            "last_heartbeat": now,
            "queues": ",".join(map(str, queues)),
            "pid": os.getpid(),
            "hostname": socket.gethostname(),
            "ip_address": "",
            "version": _RQ_VERSION,
            "python_version": "",
            "state": "idle",
            "successful_job_count": 0,
            "failed_job_count": 0,
            "total_working_time": 0.0,
        }
        with translated():
            pipe = self._redis.pipeline(transaction=True)
            pipe.delete(key)
            pipe.hset(key, mapping=cast(Any, about))
            pipe.expire(key, keys.WORKER_TTL_S)
            pipe.sadd("rq:workers", key)
            for queue in queues:
                pipe.sadd(f"rq:workers:{queue}", key)
                pipe.sadd(keys.QUEUES, keys.queue_list(queue))
            try:
                pipe.execute()
            except redis.exceptions.ResponseError as error:
                log.warning("RQ's tools will not see this worker at once: %s", error)

    def unregister(self, queues: Sequence[keys.QueueName], pools: Iterable[str]) -> None:
        """Leave RQ's registries and the pools."""
        key = f"rq:worker:{self.worker}"
        names = dict.fromkeys([*map(str, by_name(queues)), *self._shown])
        with translated():
            # No transaction: a full Redis refuses one whatever is in it, but none of these alone.
            pipe = self._redis.pipeline(transaction=False)
            pipe.srem("rq:workers", key)
            for queue in names:
                pipe.srem(f"rq:workers:{queue}", key)
            for pool in pools:
                pipe.zrem(keys.live(pool), self.worker)
            pipe.delete(key, keys.worker(self.worker))
            pipe.execute()

    def sweep(self, queues: Sequence[keys.QueueName]) -> None:
        """Keep what RQ's tools are shown true, and give Redis the clients' scripts.

        Workers that were killed go; so do what is over in the dead letter, and queues that nothing
        is in any more. This one shows itself in the queues that came since it registered. Beside
        its own, some more queues are looked at each time, whoever serves them.

        Clients may have no right to load scripts; and a Redis that restarted has forgotten them.
        """
        own, lines = dict.fromkeys(by_name(queues)), lines_of(queues)
        known = self._known.next()
        own |= dict.fromkeys(queue for queue in known if queue.line in lines)
        names = [keys.QUEUES, "rq:workers", f"rq:worker:{self.worker}", keys.SWEEPER]
        shown: list[str] = []
        with translated():
            self._forget_dead_workers()
            for script in client_scripts():
                self._redis.script_load(script)
            for some in in_parts(dict.fromkeys([*own, *known])):
                self._prune_dead(some)
                asked = [part for queue in some for part in (str(queue), int(queue in own))]
                found = cast(Any, self._sweep(keys=names, args=[_SWEEPER_MS, *asked]))
                shown += (name.decode() for name in found)
            self._shown = shown
            pipe = self._redis.pipeline(transaction=False)
            pipe.hset(names[2], "queues", ",".join(shown))
            pipe.expire(names[2], keys.WORKER_TTL_S)
            pipe.execute()

    def _forget_dead_workers(self) -> None:
        names = list(cast(Any, self._redis.smembers("rq:workers")))
        pipe = self._redis.pipeline(transaction=False)
        for name in names:
            pipe.exists(name)
        dead = [n for n, lives in zip(names, pipe.execute(), strict=True) if not lives]
        if dead:
            self._redis.srem("rq:workers", *dead)

    def _prune_dead(self, queues: Sequence[keys.QueueName]) -> None:
        gone = cast(Any, self._prune(args=[str(queue) for queue in queues]))
        for name, count in zip(gone[::2], gone[1::2], strict=True):
            queue = ascii(name.decode(errors="replace"))
            log.warning("%d entries of the dead letter of %s are over their time", count, queue)

    def report(self, *, busy: bool, succeeded: int, failed: int, busy_s: float) -> None:
        """Keep RQ's picture of the worker true: its state, and how many jobs it has done."""
        key = f"rq:worker:{self.worker}"
        with translated():
            pipe = self._redis.pipeline(transaction=True)
            pipe.hset(key, "state", "busy" if busy else "idle")
            pipe.hincrby(key, "successful_job_count", succeeded)
            pipe.hincrby(key, "failed_job_count", failed)
            pipe.hincrbyfloat(key, "total_working_time", busy_s)
            pipe.execute()


def rq_time() -> str:
    """The time as RQ writes it; for people only, leases go by Redis TIME."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
