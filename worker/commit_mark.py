"""How far a SQLite file has come, in a file beside it: one that goes back is noticed.

SQLite takes a damaged log for one that was cut by a crash, drops what follows, and opens an older
state without a word. The mark is written after each commit is durable, and not flushed itself: a
crash may leave it behind the manifest, never ahead of it.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

from vecfleet.common.errors import Unavailable

MARK_SUFFIX = ".mark"  # in place of .db
_RECORD = struct.Struct("<QI")  # generation, checksum


class CommitMark:
    """The mark of one file; its writer keeps it open."""

    def __init__(self, path: Path) -> None:
        """Open the mark of ``path``, creating it where there is none; raises ``Unavailable``.

        ``generation`` is what was marked last; 0 where nothing was, or the mark is damaged.
        """
        self.generation = 0
        mark = path.with_suffix(MARK_SUFFIX)
        try:
            self._handle = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            raw = os.pread(self._handle, _RECORD.size, 0)
        except OSError as error:
            raise Unavailable(f"{mark} cannot be used: {error.strerror}") from error
        if len(raw) == _RECORD.size:
            generation, crc = _RECORD.unpack(raw)
            if zlib.crc32(raw[:8]) == crc:
                self.generation = generation

    def put(self, generation: int) -> None:
        """Mark ``generation`` as committed; a mark that cannot be written stays behind."""
        raw = generation.to_bytes(8, "little")
        try:
            os.pwrite(self._handle, _RECORD.pack(generation, zlib.crc32(raw)), 0)
        except OSError:
            return
        self.generation = generation

    def close(self) -> None:
        """Close the file."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
