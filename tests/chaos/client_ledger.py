"""What was acknowledged to a client: a file, flushed to the disk at each acknowledgement.

One line an acknowledged call: its number, the collection, and of each document id, revision, and
the digest of its text ("" where it was deleted). A line that a crash cut off was not acknowledged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chaos.story import Operation, digest, text_of


@dataclass(frozen=True, slots=True)
class Entry:
    """One acknowledged document."""

    collection: str
    id: str
    revision: int
    digest: str  # "" when it was deleted

    @property
    def is_delete(self) -> bool:
        """Whether its absence was acknowledged."""
        return not self.digest


class ClientLedger:
    """Appends; one process at a time."""

    def __init__(self, path: Path, collection: str) -> None:
        self._collection = collection
        whole = _whole_lines(path)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.ftruncate(self._handle, len(whole))
        os.lseek(self._handle, 0, os.SEEK_END)
        lines = whole.splitlines()
        self.next = json.loads(lines[-1])["number"] + 1 if lines else 0

    def acknowledge(self, operation: Operation) -> None:
        """Note an operation; durable when this returns."""
        documents = [
            [
                id,
                operation.revision,
                "" if operation.is_delete else digest(text_of(id, operation.revision)),
            ]
            for id in operation.ids
        ]
        line = {
            "number": operation.number,
            "collection": self._collection,
            "documents": documents,
        }
        os.write(self._handle, json.dumps(line).encode() + b"\n")
        os.fsync(self._handle)
        self.next = operation.number + 1


def _whole_lines(path: Path) -> bytes:
    raw = path.read_bytes() if path.exists() else b""
    return raw[: raw.rfind(b"\n") + 1]


def read(path: Path) -> Iterator[Entry]:
    """All that was acknowledged, in order."""
    for line in _whole_lines(path).splitlines():
        entry = json.loads(line)
        for id, revision, text_digest in entry["documents"]:
            yield Entry(entry["collection"], id, revision, text_digest)
