"""What a JSON text takes in memory once it is parsed, told before it is."""

from __future__ import annotations

import re

from vecfleet.gateway.turns import Turns

# CPython's objects with their allocator's rounding and their place in what holds them.
_DICT_BYTES = 200
_LIST_BYTES = 88
_VALUE_BYTES = 40
_STRING_BYTES = 80  # beside its characters; of a name, its place in the dict

_ROUGH_BYTES = 1 << 20
_STEP_BYTES = 256 << 10
_BACKSLASHES = re.compile(rb"\\*")


async def footprint(raw: bytes, most: int) -> int:
    """About how many bytes the values in ``raw`` take beside the characters of their texts.

    Up to 1 MiB the figure is rough: brackets and commas in texts count, too. Counting ends soon
    after ``most``.
    """
    commas = (_VALUE_BYTES + _STRING_BYTES) * raw.count(b",")
    rough = _containers(raw) + commas
    return rough if rough <= _ROUGH_BYTES else await _outside_of_texts(raw, most)


def _containers(raw: bytes) -> int:
    return _DICT_BYTES * raw.count(b"{") + _LIST_BYTES * raw.count(b"[")


async def _outside_of_texts(raw: bytes, most: int) -> int:
    turns = Turns()
    size = start = 0
    inside = False  # a text that the last step left open
    while start < len(raw) and size <= most:
        end = start + _STEP_BYTES
        if raw[end - 1 : end] == b"\\" and (run := _BACKSLASHES.match(raw, end)):
            end = run.end() + 1  # an escape stays whole
        step = raw[start:end]
        if b"\\" in step:
            step = step.replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = step.split(b'"')
        outside = b"".join(pieces[inside::2])
        size += _containers(outside) + _VALUE_BYTES * outside.count(b",")
        size += _STRING_BYTES * (len(pieces) - 1) // 2  # two quotes each
        inside ^= len(pieces) % 2 == 0
        start = end
        await turns.give()
    return size
