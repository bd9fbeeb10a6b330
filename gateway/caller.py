"""On whose behalf a request is answered."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vecfleet.common.api_keys import SCOPES, Scope
from vecfleet.common.errors import Forbidden
from vecfleet.common.keys import DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class Caller:
    """A tenant, and what its key may be used for."""

    tenant: str = DEFAULT_TENANT
    scopes: frozenset[Scope] = frozenset()
    key_id: str = ""

    def check_scope(self, needed: Collection[Scope]) -> None:
        """Raise ``Forbidden`` unless one of ``needed`` is there; no needs are met by everybody."""
        if needed and self.scopes.isdisjoint(needed):
            raise Forbidden(f"this takes an API key with the scope {' or '.join(needed)}")

    def check_operator(self) -> None:
        """Raise ``Forbidden`` unless the caller may see the whole fleet, not one tenant's part."""
        if not self.is_operator:
            raise Forbidden("this shows the whole fleet: it takes an admin key of the tenant '-'")

    @property
    def is_operator(self) -> bool:
        """Whether it is an administrator of the default tenant."""
        return self.tenant == DEFAULT_TENANT and "admin" in self.scopes


ANYBODY = Caller(scopes=frozenset(SCOPES))  # where no keys are asked for
NOBODY = Caller()
