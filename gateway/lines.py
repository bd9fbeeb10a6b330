"""Cutting a stream of bytes into numbered lines, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """One line that is not blank; ``raw`` is None where it was too long and was thrown away."""

    number: int  # from 1
    raw: bytes | None


class LineCutter:
    """Holds at most one unfinished line of ``max_bytes``."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rest = bytearray()
        self._skipping = False  # inside a line that is too long
        self._number = 0

    def feed(self, part: bytes) -> Iterator[Line]:
        """The lines that ``part`` completes."""
        start = 0
        while (end := part.find(b"\n", start)) >= 0:
            yield from self._finish(part[start:end])
            start = end + 1
        self._keep(part[start:])

    def end(self) -> Iterator[Line]:
        """The last line, where no newline follows it."""
        if self._rest or self._skipping:
            yield from self._finish(b"")

    def _keep(self, piece: bytes) -> None:
        if self._skipping:
            return
        self._rest += piece
        if len(self._rest) > self._max_bytes:
            self._rest = bytearray()
            self._skipping = True

    def _finish(self, piece: bytes) -> Iterator[Line]:
        self._number += 1
        self._keep(piece)
        raw = bytes(self._rest)
        skipped = self._skipping
        self._rest = bytearray()
        self._skipping = False
        if skipped:
            yield Line(self._number, None)
        elif raw.strip():
            yield Line(self._number, raw)
