"""The queues of every tenant: found among those that RQ knows, forgotten when they are empty."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import redis

from vecfleet.common import keys
from vecfleet.common.redis_client import read_lua, translated

_PREFIX = "rq:queue:"
_STEP = 1000
MOST_KNOWN = 10_000


class TenantQueues:
    """The tenants' queues as of the last ``refresh``; claims need none of this, only chores do."""

    def __init__(self, client: redis.Redis) -> None:
        """Knows no tenant but the default one until the first ``refresh``."""
        self._redis = client
        self._forget = client.register_script(read_lua(Path(__file__).parent, "forget"))
        self._by_line: dict[str, list[keys.QueueName]] = {}

    def refresh(self) -> None:
        """Read which queues there are; raises ``RedisUnavailable``."""
        found: dict[str, list[keys.QueueName]] = {}
        cursor = count = 0
        while count < MOST_KNOWN:
            with translated():
                answer: Any = self._redis.sscan(keys.QUEUES, cursor, f"{_PREFIX}vf.*", _STEP)
            cursor, members = answer
            for raw in members:
                try:
                    queue = keys.QueueName.parse(raw.decode().removeprefix(_PREFIX))
                except ValueError:
                    continue  # somebody else's
                if queue.task != "merge":  # asked for by name
                    found.setdefault(queue.line, []).append(queue)
                    count += 1
            if cursor == 0:
                break
        self._by_line = found

    def of(self, queues: Iterable[keys.QueueName]) -> list[keys.QueueName]:
        """``queues`` with those of every tenant in place of each that stands for them."""
        all_of_them: dict[keys.QueueName, None] = {}
        for queue in queues:
            if queue.is_of_every_tenant:
                all_of_them[queue.of(keys.DEFAULT_TENANT)] = None
                all_of_them |= dict.fromkeys(self._by_line.get(queue.line, ()))
            else:
                all_of_them[queue] = None
        return list(all_of_them)

    def forget_unused(self, queues: Iterable[keys.QueueName]) -> list[keys.QueueName]:
        """Take what is unused out of RQ's set; ``of(queues)`` without it."""
        known = self.of(queues)
        asked = [queue for queue in known if queue.tenant != keys.DEFAULT_TENANT]
        asked = [queue for queue in asked if queue.task != "merge"]
        if not asked:
            return known
        with translated():
            gone = cast(Any, self._forget(keys=[keys.QUEUES], args=[str(q) for q in asked]))
        names = {name.decode() for name in gone}
        return [queue for queue in known if str(queue) not in names]
