"""Reading query strings; every error names its parameter."""

from __future__ import annotations

from starlette.requests import Request

from vecfleet.common.errors import InvalidInput, UnknownField

_FLAGS = {"true": True, "1": True, "false": False, "0": False}


def query_only(request: Request, known: frozenset[str]) -> None:
    """Raise ``UnknownField`` when there is a parameter that is not ``known``."""
    unknown = sorted(set(request.query_params.keys()) - known)
    if unknown:
        name = unknown[0][:64]
        raise UnknownField(f"{name} is not a query parameter here", field=name)


def query_flag(request: Request, name: str, default: bool) -> bool:
    """true, false, 1 or 0."""
    value = request.query_params.get(name)
    if value is None:
        return default
    if value not in _FLAGS:
        raise InvalidInput(f"{name} must be true or false", field=name)
    return _FLAGS[value]


def query_whole(request: Request, name: str, low: int, high: int) -> int | None:
    """A whole number from ``low`` to ``high``, or None where it is missing."""
    value = request.query_params.get(name)
    if value is None:
        return None
    digits = value.isascii() and value.isdigit() and len(value) <= 20
    if not digits or not low <= int(value) <= high:
        raise InvalidInput(f"{name} must be a whole number from {low} to {high}", field=name)
    return int(value)
