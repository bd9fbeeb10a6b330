"""Segments that lie under checksums that are right: a writer that went wrong, or a hostile hand.

No checksum tells of these. What can be told is that a segment does not fit together; what cannot be
is another vector, version or text in the place of the right one.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import msgpack
from hypothesis import strategies as st

_HEADER = struct.Struct("<8sII")
_HEADER_BYTES = 4096
_NUMBERS = (0, 1, 2, 3, 7, 63, 64, 4096, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
_NOT_NUMBERS: tuple[Any, ...] = (-1, None, "x", [], {}, 1.5, True, b"\0")


def table_of(segment: bytes) -> dict[str, Any]:
    """A segment's table of columns."""
    _, length, _ = _HEADER.unpack_from(segment)
    table: dict[str, Any] = msgpack.unpackb(segment[_HEADER.size : _HEADER.size + length])
    return table


def with_table(segment: bytearray, table: Mapping[str, Any]) -> bytes:
    """``segment`` with ``table`` and every checksum made right again, as far as they lie in it."""
    columns = table.get("columns")
    for entry in columns.values() if isinstance(columns, dict) else ():
        if isinstance(entry, list) and len(entry) == 3:
            at, length, _ = entry
            if type(at) is int and type(length) is int and 0 <= at <= at + length <= len(segment):
                entry[2] = zlib.crc32(memoryview(segment)[at : at + length])
    raw = msgpack.packb(table)[: _HEADER_BYTES - _HEADER.size]
    magic = bytes(segment[:8])
    segment[: _HEADER.size] = _HEADER.pack(magic, len(raw), zlib.crc32(raw))
    segment[_HEADER.size : _HEADER.size + len(raw)] = raw
    return bytes(segment)


@st.composite
def lying(draw: st.DrawFn, segment: bytes) -> bytes:
    """``segment`` with one to three lies, in its table or in its columns."""
    made, table = bytearray(segment), table_of(segment)
    for _ in range(draw(st.integers(1, 3))):
        column = draw(st.sampled_from(sorted(table["columns"])))
        where = draw(st.sampled_from(("column", "column", "entry", "number", "gone", "swap")))
        if where == "column":
            _lie_in_column(draw, made, table_of(segment)["columns"][column])
        elif where == "entry":
            entry = list(table["columns"][column])
            entry[draw(st.integers(0, 1))] = draw(_wrong(entry[0] if type(entry[0]) is int else 0))
            table["columns"][column] = entry
        elif where == "number":
            name = draw(st.sampled_from(("rows", "dimension", "size")))
            table[name] = draw(_wrong(table[name] if type(table[name]) is int else 0))
        elif where == "gone":
            table["columns"] = {k: v for k, v in table["columns"].items() if k != column}
            break
        else:
            other = draw(st.sampled_from(sorted(table["columns"])))
            columns = table["columns"]
            columns[column], columns[other] = columns[other], columns[column]
    return with_table(made, table)


def _lie_in_column(draw: st.DrawFn, made: bytearray, entry: list[int]) -> None:
    at, length, _ = entry
    if not length:
        return
    width = draw(st.sampled_from((1, 2, 4, 8)))
    place = draw(st.integers(0, max(0, length - width)))
    value = draw(st.sampled_from(_NUMBERS) | st.integers(0, 2**64 - 1))
    raw = (value % 2 ** (8 * width)).to_bytes(width, "little")
    made[at + place : at + place + len(raw)] = raw


def _wrong(right: int) -> st.SearchStrategy[Any]:
    near = [right + by for by in (-64, -8, -1, 1, 8, 64) if 0 <= right + by < 2**64]
    return st.sampled_from((*near, *_NUMBERS, *_NOT_NUMBERS))
