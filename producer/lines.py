"""Cutting a stream of bytes into numbered lines, in bounded memory and large steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO

CHUNK_BYTES = 256 << 10
MAX_LINE_BYTES = 4 << 20  # above every document that could be accepted, however it is escaped
_BOM = b"\xef\xbb\xbf"

Lines = tuple[int, list[bytes | None]]


def cut_lines(stream: IO[bytes], max_bytes: int = MAX_LINE_BYTES) -> Iterator[Lines]:
    """The number of the first line and the lines, without their newline, of each piece read.

    A line of more than ``max_bytes`` is thrown away and stands as None. A byte order mark at the
    beginning is left out.
    """
    number = 1
    rest = b""
    parts: list[bytes] = []  # of a line longer than a chunk
    held = 0
    is_first = True
    size = min(CHUNK_BYTES, max_bytes)  # so that a line inside one chunk is never too long
    read = getattr(stream, "read1", stream.read)  # what a pipe has, instead of waiting for more
    while chunk := read(size):
        if is_first:
            while len(chunk) < len(_BOM) and _BOM.startswith(chunk) and (more := read(size)):
                chunk += more
            chunk = chunk.removeprefix(_BOM)
            is_first = False
        head, newline, tail = chunk.partition(b"\n")
        if not newline:
            held += len(head)
            if held <= max_bytes:
                parts.append(head)
            else:
                parts.clear()
            continue
        first = b"".join(parts) + head if held + len(head) <= max_bytes else None
        *whole, rest = tail.split(b"\n")
        lines: list[bytes | None] = [first, *whole]
        yield number, lines
        number += len(lines)
        parts, held = [rest], len(rest)
    if held:
        yield number, [b"".join(parts) if held <= max_bytes else None]
