"""Reading the fields of a JSON object by hand; every error names its field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vecfleet.common.errors import InvalidInput, UnknownField

Row = Mapping[str, Any]


def only(row: Row, known: frozenset[str], inside: str = "") -> None:
    """Raise ``UnknownField`` when ``row`` has a field that is not ``known``."""
    if not row.keys() <= known:
        name = inside + min(row.keys() - known)
        listed = ", ".join(sorted(known))
        shown = name[:64]
        raise UnknownField(f"{shown} is not a field here; there are {listed}", field=shown)


def word(row: Row, name: str, default: str | None = None) -> str | None:
    """A short string such as a name, or ``default`` where it is missing or null."""
    value = row.get(name)
    if value is None:
        return default
    if not isinstance(value, str) or not value or len(value) > 512:
        raise InvalidInput(f"{name} must be a string of 1 to 512 characters", field=name)
    return value


def choice(row: Row, name: str, allowed: tuple[str, ...]) -> str:
    """One of ``allowed``; the first where it is missing or null."""
    value = row.get(name)
    if value is None:
        return allowed[0]
    if value not in allowed:
        raise InvalidInput(f"{name} must be one of {', '.join(allowed)}", field=name)
    return str(value)


def flag(row: Row, name: str, default: bool) -> bool:
    """True or false."""
    value = row.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidInput(f"{name} must be true or false", field=name)
    return value


def whole(row: Row, name: str, default: int | None, low: int, high: int) -> int | None:
    """A whole number from ``low`` to ``high``."""
    value = row.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidInput(f"{name} must be a whole number from {low} to {high}", field=name)
    return value


def number(row: Row, name: str, default: float | None, low: float, high: float) -> float | None:
    """A number from ``low`` to ``high``."""
    value = row.get(name)
    if value is None:
        return default
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not low <= value <= high
    ):
        raise InvalidInput(f"{name} must be a number from {low:g} to {high:g}", field=name)
    return float(value)


def strings(row: Row, name: str) -> list[Any]:
    """A list, whose items the caller checks."""
    value = row.get(name)
    if not isinstance(value, list):
        raise InvalidInput(f"{name} must be a list of strings", field=name)
    return value
