"""Files that are whole or absent: written under another name, flushed, renamed, flushed again."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

from vecfleet.common.errors import Unavailable

TEMPORARY_SUFFIX = ".tmp"

_PIECE_BYTES = 1 << 20

CrashPoint = Callable[[str], None]
"""Called with the name of each step that a crash could cut; tests end the process there."""


def no_crash(name: str) -> None:
    """The crash point of every run that is no test."""


def sync_directory(directory: Path) -> None:
    """Make the names in ``directory`` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(path: Path, write: Callable[[int], None], crash: CrashPoint = no_crash) -> None:
    """Create ``path`` with what ``write`` puts into the file descriptor it is given.

    After a return the file and its name are durable; after any failure there is nothing but, at
    most, a temporary file, which is removed where possible. Raises ``Unavailable`` for an
    ``OSError`` such as a full disk.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
        try:
            write(handle)
            crash("written")
            os.fsync(handle)
        finally:
            os.close(handle)
        crash("synced")
        temporary.rename(path)
        crash("renamed")
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Unavailable(f"{path.name} cannot be written: {error.strerror or error}") from error


def file_crc(path: Path) -> int:
    """The CRC-32 of a file, read a piece at a time."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE_BYTES):
            crc = zlib.crc32(piece, crc)
    return crc


def write_all(handle: int, data: memoryview) -> None:
    """Write all of ``data``; ``os.write`` alone may stop early."""
    while data:
        data = data[os.write(handle, data) :]
