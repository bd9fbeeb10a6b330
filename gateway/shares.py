"""Something bounded that tenants share: one may hold as much as all leave free.

So one alone gets half, two a third each, and there is always something left for the next.
"""

from __future__ import annotations


class Shares:
    """Who holds how much of ``most``: bytes, or places."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._total = 0
        self._held: dict[str, int] = {}

    def take(self, tenant: str, amount: int = 1) -> bool:
        """Take ``amount``, unless the tenant holds more by now than would be left free."""
        if not self.has_room(tenant, amount):
            return False
        self._held[tenant] = self._held.get(tenant, 0) + amount
        self._total += amount
        return True

    def has_room(self, tenant: str, amount: int = 1) -> bool:
        """Whether ``take`` would take so much now."""
        return self._held.get(tenant, 0) <= self._most - self._total - amount

    def give(self, tenant: str, amount: int = 1) -> None:
        """Give back what was taken."""
        left = self._held.get(tenant, 0) - amount
        if left > 0:
            self._held[tenant] = left
        else:
            self._held.pop(tenant, None)
        self._total -= amount
