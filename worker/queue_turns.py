"""Whose queues a claim asks first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

from vecfleet.common import keys


class QueueTurns:
    """First the tenant who was served longest ago, and of a tenant's queues the one that was.

    So those that have something waiting share evenly: many queues win a tenant no larger share, and
    who has nothing waiting leaves the turn to nobody in particular.
    """

    def __init__(self) -> None:
        self._claims = 0
        self._tenants: dict[str, int] = {}  # the number of the last claim that served it
        self._queues: dict[keys.QueueName, int] = {}

    def order(self, names: Sequence[keys.QueueName]) -> list[keys.QueueName]:
        """``names`` in the order of their right to the next claim: the tenants by turns."""
        self._forget_all_but(names)
        of_tenant: dict[str, list[keys.QueueName]] = {}
        for name in sorted(names, key=lambda name: self._queues.get(name, 0)):
            of_tenant.setdefault(name.tenant, []).append(name)
        tenants = sorted(of_tenant, key=lambda tenant: self._tenants.get(tenant, 0))
        rows = zip_longest(*(of_tenant[tenant] for tenant in tenants))
        return [name for row in rows for name in row if name is not None]

    def served(self, queues: Iterable[keys.QueueName], asked: Iterable[keys.QueueName]) -> None:
        """A claim that asked ``asked`` got jobs of ``queues``."""
        self._claims += 1
        by_name = set(asked)
        for queue in set(queues):
            name = queue if queue in by_name else queue.of(keys.EVERY_TENANT)
            self._tenants[name.tenant] = self._queues[name] = self._claims

    def _forget_all_but(self, names: Sequence[keys.QueueName]) -> None:
        if len(self._queues) > 2 * len(names):
            known = set(names)
            self._queues = {name: at for name, at in self._queues.items() if name in known}
            tenants = {name.tenant for name in names}
            self._tenants = {name: at for name, at in self._tenants.items() if name in tenants}
