"""Names that people give, and the patterns they must follow."""

from __future__ import annotations

import re
import secrets

from vecfleet.common.errors import InvalidName

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
_TENANT = re.compile(r"-|[a-z0-9][a-z0-9_-]{0,31}")
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


def check_name(name: object, field: str = "collection") -> str:
    """``name`` if it may name a collection; raises ``InvalidName`` otherwise."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidName(field=field)
    return name


def check_tenant(value: object, field: str = "tenant") -> str:
    """``value`` if it may name a tenant, as part of queues' names; ``-`` is the default one."""
    if not isinstance(value, str) or not _TENANT.fullmatch(value):
        raise InvalidName(
            f"{field} may hold 1 to 32 of a-z, 0-9, '_' and '-', and must begin with a letter or "
            "digit; '-' alone is the default one",
            field=field,
        )
    return value


def check_id(value: object, field: str) -> str:
    """``value`` if it has the form of a job's or a submission's id."""
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise InvalidName(f"{field} may hold 1 to 128 of a-z, A-Z, 0-9, '_' and '-'", field=field)
    return value


def new_id() -> str:
    """A fresh id of 128 random bits, hex."""
    return secrets.token_hex(16)
