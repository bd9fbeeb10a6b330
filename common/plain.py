"""Dataclasses out of the plain maps in which they travel; whoever wrote a map may have erred."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vecfleet.common.errors import CorruptPayload

T = TypeVar("T")


def build(cls: type[T], wire: object) -> T:
    """The dataclass ``cls`` out of a map of its fields; fields it does not know are ignored.

    Lists become tuples. A ``Literal`` may be any text: a newer version may know more of them.
    Raises a ``CorruptPayload`` that names the field which is missing or has another type.
    """
    if not isinstance(wire, dict):
        raise CorruptPayload(f"{cls.__name__}: it must be a map")
    known: dict[str, Any] = {}
    for name, hint, required in _fields_of(cls):  # type: ignore[arg-type]
        if name in wire:
            known[name] = _value(hint, wire[name], f"{cls.__name__}.{name}")
        elif required:
            raise CorruptPayload(f"{cls.__name__}.{name} is missing")
    return cls(**known)


@cache
def _fields_of(cls: type[Any]) -> list[tuple[str, Any, bool]]:
    """Of each field its name, its type, and whether it must be given."""
    hints = get_type_hints(cls)
    return [(field.name, hints[field.name], _is_required(field)) for field in fields(cls)]


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` as one of the type ``hint``."""
    of = get_args(hint)
    if is_dataclass(hint):
        return build(hint, value)  # type: ignore[arg-type]
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(_value(of[0], entry, where) for entry in value)
    if get_origin(hint) is dict and isinstance(value, dict):
        return {_value(of[0], k, where): _value(of[1], v, where) for k, v in value.items()}
    if type(value) in _types_of(hint):
        return value
    raise CorruptPayload(f"{where} is of another type")


@cache
def _types_of(hint: Any) -> frozenset[type[Any]]:
    """The types of a value that needs no building."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return frozenset[type[Any]]().union(*map(_types_of, get_args(hint)))
    if origin is Literal:
        return frozenset((str,))
    if hint is float:
        return frozenset((int, float))
    return frozenset() if origin is not None else frozenset((hint,))
