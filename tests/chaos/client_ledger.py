"""What was acknowledged to a client: a file, flushed to the disk at each acknowledgement.

One line an acknowledged call: its number, the collection, when (by the machine's monotonic clock),
and of each document id, revision, and the digest of its text ("" where it was deleted). Besides,
notes: of a 202 that is not done yet, of a loss that was noticed, of an answer that was wrong. A
line that a crash cut off was not written.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos.story import Operation, digest, text_of


@dataclass(frozen=True, slots=True)
class Entry:
    """One acknowledged document."""

    collection: str
    id: str
    revision: int
    digest: str  # "" when it was deleted, or dropped from the dead letter

    @property
    def is_delete(self) -> bool:
        """Whether its absence was acknowledged."""
        return not self.digest


@dataclass(frozen=True, slots=True)
class Note:
    """What a client wrote down besides."""

    what: str  # accepted, lost, wrong, ...
    number: int  # of the operation
    at_s: float
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One acknowledged call with documents, or deletions."""

    collection: str
    number: int
    submission: str  # its id, where the client was told it
    at_s: float
    documents: int
    dropped: int  # of these, out of the dead letter
    is_delete: bool


class ClientLedger:
    """Appends; one process at a time."""

    def __init__(self, path: Path, collection: str) -> None:
        self._collection = collection
        whole = _whole_lines(path)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.ftruncate(self._handle, len(whole))
        os.lseek(self._handle, 0, os.SEEK_END)
        calls = [line for line in map(json.loads, whole.splitlines()) if "note" not in line]
        self.next: int = calls[-1]["number"] + 1 if calls else 0

    def acknowledge(
        self,
        operation: Operation,
        digests: Mapping[str, str] | None = None,
        *,
        collection: str = "",
        exists: bool = True,
        submission: str = "",
    ) -> None:
        """Note an operation; durable when this returns.

        ``digests`` are those that are not the text's own; ``exists`` whether the collection does:
        with one that was deleted all that was acknowledged in it goes.
        """
        given = digests or {}
        documents = [
            [
                id,
                operation.revision,
                ""
                if operation.is_delete
                else given.get(id, digest(text_of(id, operation.revision))),
            ]
            for id in operation.ids
        ]
        self._write(
            number=operation.number,
            collection=collection or self._collection,
            documents=documents,
            exists=exists,
            submission=submission,
            is_delete=operation.is_delete,
        )
        self.next = operation.number + 1

    def note(self, what: str, number: int, **fields: Any) -> None:
        """Write something else down; durable when this returns."""
        self._write(note=what, number=number, **fields)

    def _write(self, **line: Any) -> None:
        os.write(self._handle, json.dumps({**line, "at": time.monotonic()}).encode() + b"\n")
        os.fsync(self._handle)


def _whole_lines(path: Path) -> bytes:
    raw = path.read_bytes() if path.exists() else b""
    return raw[: raw.rfind(b"\n") + 1]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _whole_lines(path).splitlines()]


def _calls(path: Path) -> Iterator[tuple[dict[str, Any], bool]]:
    """Lines of calls, and whether their collection was not deleted afterwards."""
    calls = [line for line in _lines(path) if "note" not in line]
    gone = {line["collection"]: place for place, line in enumerate(calls) if not line["exists"]}
    for place, line in enumerate(calls):
        yield line, place > gone.get(line["collection"], -1)


def read(path: Path) -> Iterator[Entry]:
    """All that was acknowledged and is to be there, in order."""
    for line, stays in _calls(path):
        if stays:
            for id, revision, text_digest in line["documents"]:
                yield Entry(line["collection"], id, revision, text_digest)


def read_notes(path: Path, *what: str) -> list[Note]:
    """The notes of some kinds, in order."""
    return [
        Note(line["note"], line["number"], line["at"], line)
        for line in _lines(path)
        if line.get("note") in what
    ]


def read_calls(path: Path) -> list[Call]:
    """All calls that were acknowledged, in order, but those in collections that were deleted."""
    calls = []
    for line, stays in _calls(path):
        digests = [text_digest for _, _, text_digest in line["documents"]]
        is_delete = line["is_delete"]
        dropped = 0 if is_delete else digests.count("")
        if stays and digests:
            calls.append(
                Call(
                    line["collection"],
                    line["number"],
                    line["submission"],
                    line["at"],
                    len(digests),
                    dropped,
                    is_delete,
                )
            )
    return calls


def read_collections(path: Path) -> dict[str, bool]:
    """Of each collection that was acknowledged whether it exists."""
    return {line["collection"]: line["exists"] for line in _lines(path) if "note" not in line}
