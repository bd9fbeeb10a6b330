"""The fleet's queues that RQ knows; there may be any number, so they come by some at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import redis

from vecfleet.common import keys
from vecfleet.common.redis_client import translated

_PREFIX = "rq:queue:"
AT_ONCE = 1000


class KnownQueues:
    """One way through them, again and again. Claims need none of this, only chores do."""

    def __init__(self, client: redis.Redis, at_once: int = AT_ONCE) -> None:
        """Begins where Redis does."""
        self._redis = client
        self._at_once = at_once
        self._cursor = 0

    def next(self) -> list[keys.QueueName]:
        """About ``at_once`` more of them; raises ``RedisUnavailable``."""
        with translated():
            answer: Any = self._redis.sscan(
                keys.QUEUES, self._cursor, f"{_PREFIX}vf.*", count=self._at_once
            )
        self._cursor, members = answer
        return list(parsed(raw.removeprefix(_PREFIX.encode()) for raw in members))


def parsed(names: Iterable[bytes]) -> Iterator[keys.QueueName]:
    """The queues of these names, without those that are none of the fleet's."""
    for raw in names:
        try:
            yield keys.QueueName.parse(raw.decode())
        except ValueError:
            continue


def by_name(queues: Iterable[keys.QueueName]) -> list[keys.QueueName]:
    """``queues`` with the default tenant's in place of each that stands for all tenants'."""
    return [q.of(keys.DEFAULT_TENANT) if q.is_of_every_tenant else q for q in queues]


def lines_of(queues: Iterable[keys.QueueName]) -> dict[str, keys.QueueName]:
    """Those of ``queues`` that stand for all tenants', by their lines."""
    return {queue.line: queue for queue in queues if queue.is_of_every_tenant}


def in_parts(queues: Iterable[keys.QueueName]) -> Iterator[list[keys.QueueName]]:
    """At most ``AT_ONCE`` at a time, so that no call holds Redis up for long."""
    rest = iter(queues)
    while some := list(islice(rest, AT_ONCE)):
        yield some
