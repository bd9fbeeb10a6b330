"""The journal of one submission: what was sent under which version, and what is settled.

One JSON array a line, after a header; a line is appended and never changed:

    {"journal": 1, "submission": id, "collection": name, "uid": uid}
    ["sent", place, digest, version, documents, unchanged]   its job is in Redis
    ["done", place, committed, failed]                       acknowledged: merged, or refused
    ["same", place, digest, documents]                       nothing of it had changed: not sent

A run that continues skips what is done or the same, sends the rest under the versions of the first
run, and refuses another input by the digests. Records outlive the process at once, and the machine
after the next ``sync``.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from vecfleet.common.errors import ConfigError

FORMAT = 1


@dataclass(slots=True)
class BlockRecord:
    """What the journal knows of one block."""

    digest: str
    documents: int  # that were sent
    unchanged: int = 0  # that were not, because nothing had changed
    version: int = 0  # 0 where Redis did not tell one
    committed: int = 0
    failed: int = 0
    is_settled: bool = False


@dataclass(slots=True)
class Journal:
    """An open journal; this process alone writes to it."""

    path: Path
    submission: str
    collection: str
    uid: str
    blocks: dict[int, BlockRecord] = field(default_factory=dict)
    _file: IO[bytes] | None = None

    @classmethod
    def open(cls, path: Path, *, submission: str | None, collection: str, uid: str) -> Self | None:
        """Open or begin the journal of ``submission``; None where there is none to name it.

        Without ``submission`` the file tells which one it is. Raises ``ConfigError`` when the file
        is another submission's or collection's, in use by another process, or no journal.
        """
        try:
            if submission is None and not (path.exists() and path.stat().st_size):
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"journal {path}: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise ConfigError(f"journal {path} is in use by another process") from error
        try:
            journal = cls(path, submission or "", collection, uid, _file=file)
            journal._load()
        except BaseException:
            file.close()
            raise
        return journal

    def last_version(self) -> tuple[int, int] | None:
        """Place and version of the last block whose version is known."""
        known = [(place, block.version) for place, block in self.blocks.items() if block.version]
        return max(known, default=None)

    def sent(self, place: int, record: BlockRecord) -> None:
        """A block's job is in Redis."""
        self.blocks[place] = record
        self._append(
            "sent", place, record.digest, record.version, record.documents, record.unchanged
        )

    def done(self, place: int, committed: int, failed: int) -> None:
        """A block is settled."""
        self._append("done", place, committed, failed)

    def same(self, place: int, digest: str, documents: int) -> None:
        """Nothing of a block had changed."""
        self._append("same", place, digest, documents)

    def sync(self) -> None:
        """Make what was appended outlast the machine; may run in another thread."""
        assert self._file is not None
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ConfigError(f"journal {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """Let another process have it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Close it and delete the file."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _append(self, *record: object) -> None:
        self._write(json.dumps(record, separators=(",", ":")))

    def _write(self, line: str) -> None:
        assert self._file is not None
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise ConfigError(f"journal {self.path}: {error.strerror}") from error

    def _load(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        raw = self._file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            self._file.truncate(len(whole))  # the last line was cut off by a crash
        lines = whole.splitlines()
        if not lines:
            header = {"submission": self.submission, "collection": self.collection, "uid": self.uid}
            self._write(json.dumps({"journal": FORMAT, **header}))
            return
        try:
            self._check_header(json.loads(lines[0]))
            for line in lines[1:]:
                self._replay(*json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{self.path} is no journal, or a damaged one; remove it or choose another"
            ) from error

    def _check_header(self, header: dict[str, Any]) -> None:
        if header["journal"] != FORMAT:
            raise ConfigError(f"journal {self.path} was written by another version of vecfleet")
        if self.submission and header["submission"] != self.submission:
            raise ConfigError(
                f"journal {self.path} belongs to submission {header['submission']}; "
                "choose another path, or leave the submission out to continue that one"
            )
        if header["uid"] != self.uid:
            raise ConfigError(
                f"journal {self.path} belongs to another collection {header['collection']!r}, "
                "perhaps one of this name that was deleted; choose another path"
            )
        self.submission = header["submission"]

    def _replay(self, kind: str, place: int, *rest: Any) -> None:
        if kind == "sent":
            digest, version, documents, unchanged = rest
            before = self.blocks.get(place)
            if before is not None and not version:
                version = before.version
            self.blocks[place] = BlockRecord(digest, documents, unchanged, version)
        elif kind == "done":
            block = self.blocks[place]
            block.committed, block.failed = rest
            block.is_settled = True
        elif kind == "same":
            digest, documents = rest
            self.blocks[place] = BlockRecord(digest, 0, documents, is_settled=True)
        else:
            raise ValueError(kind)
