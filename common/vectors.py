"""Vectors that callers send, in any form that programs have them in."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from typing import Any

from vecfleet.common.errors import InvalidVector


def parse_vector(value: Any, dimension: int, field: str = "vector") -> bytes:
    """A query vector from a list of numbers, brought to length 1, as raw float32.

    Raises ``InvalidVector`` naming ``field`` for a wrong dimension, zero, NaN or infinity.
    """
    if not isinstance(value, list):
        raise InvalidVector(f"{field} must be a list of numbers", field=field)
    if len(value) != dimension:
        raise InvalidVector(
            f"{field} has {len(value)} numbers; the collection's vectors have {dimension}",
            field=field,
        )
    if not all(type(x) is float or type(x) is int for x in value):
        raise InvalidVector(f"{field} must be a list of numbers", field=field)
    try:
        length = math.hypot(*value)
    except OverflowError:
        length = math.inf
    if not math.isfinite(length) or length == 0.0:
        raise InvalidVector(field=field)
    return array("f", [x / length for x in value]).tobytes()


def as_numbers(value: Any, field: str = "vector") -> list[Any]:
    """The numbers of a list, tuple, array or NumPy row, or of raw float32 as ``embed`` answers."""
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return memoryview(value).cast("B").cast("f").tolist()
        except TypeError as error:
            raise InvalidVector(f"{field} is no row of raw float32", field=field) from error
    if callable(to_list := getattr(value, "tolist", None)):
        value = to_list()
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise InvalidVector(f"{field} must be a list of numbers", field=field)
    return list(value)
