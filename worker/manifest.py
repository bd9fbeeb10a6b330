"""The manifest: SQLite, the one place where a change of the index becomes true.

table      holds
state      one row: what the partition is, its generation, the fencing token, next number, watermark
segments   the segments that make up the index
deaths     rows that died, as (segment, generation, array of 32-bit rows): readers follow these
templates  trained indexes that hold no vectors, by hash
indexes    the derived index of a segment, where there is one
applied    digests of the shards that were applied, the last ``MAX_APPLIED`` of them

SQLite has no checksums, so each row of the first five tables carries one, and ``state`` the
exclusive-or of them all: a flipped bit or a lost row is noticed when the manifest is opened.
``applied`` has none: versions make a shard that is applied twice harmless, the table merely saves
the work. A manifest that went back, because its log was damaged or cut, is told by its mark
(commit_mark.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from vecfleet.common.errors import SpaceMismatch, StaleWriter, Unavailable
from vecfleet.worker.commit_mark import CommitMark
from vecfleet.worker.durable import CrashPoint, no_crash
from vecfleet.worker.partition_state import (
    Change,
    IndexEntry,
    PartitionSpec,
    SegmentEntry,
    State,
    Template,
)
from vecfleet.worker.rows import RowNumbers
from vecfleet.worker.sqlite_file import SqliteFile

FILE_NAME = "manifest.db"
MAX_APPLIED = 1_000_000  # shards, 256 million documents; older ones are left to their versions
PRUNE_SLACK = 10_000
FOLD_DELTAS = 64  # more deltas of one segment than this are made one
_SCHEMA = """
CREATE TABLE state (one INTEGER PRIMARY KEY CHECK (one = 1), record BLOB NOT NULL);
CREATE TABLE segments (number INTEGER PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE deaths (segment INTEGER, generation INTEGER, rows BLOB NOT NULL, crc INTEGER NOT NULL,
                     PRIMARY KEY (segment, generation));
CREATE INDEX deaths_by_generation ON deaths (generation);
CREATE TABLE templates (hash TEXT PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE indexes (segment INTEGER PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE applied (sequence INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE);
"""


class Manifest(SqliteFile):
    """A partition's manifest; use ``open`` or ``open_to_read``."""

    _mark: CommitMark | None = None  # the writer's

    @classmethod
    def open(cls, directory: Path, spec: PartitionSpec, token: int) -> Manifest:
        """Open the manifest for writing, creating it where there is none, and take it over.

        ``token`` is the fencing token of the writer's lease. Raises ``StaleWriter`` when a later
        one was here, ``SpaceMismatch`` when the partition holds something else, and
        ``CorruptManifest``.
        """
        path = directory / FILE_NAME
        manifest = cls(path)
        try:
            manifest._mark = CommitMark(path)
            with manifest.transaction():
                if not manifest._has_tables():
                    if any(directory.glob("seg-*.seg")):
                        raise manifest.corrupt("it is empty, and there are segments beside it")
                    manifest._create(spec, token)
            manifest.check()
            manifest._take_over(spec, token)
        except BaseException:
            manifest.close()
            raise
        return manifest

    def close(self) -> None:
        """Close the connection, and the mark."""
        super().close()
        if self._mark is not None:
            self._mark.close()

    @classmethod
    def open_to_read(cls, directory: Path) -> Manifest:
        """Open the manifest for reading; raises ``Unavailable`` before a writer has made it."""
        path = directory / FILE_NAME
        if not path.exists():
            raise Unavailable(f"{directory.name} holds no index yet")
        manifest = cls(path)
        with manifest.translated():
            manifest.db.execute("PRAGMA query_only = 1")
            if not manifest._has_tables():
                manifest.close()
                raise Unavailable(f"{directory.name} holds no index yet")
        return manifest

    def data_version(self) -> int:
        """A number that changes when another connection has committed; costs microseconds."""
        with self.translated():
            return int(self.db.execute("PRAGMA data_version").fetchone()[0])

    def state(self) -> State:
        """The present state."""
        with self.snapshot():
            return self._read_state()

    def deltas(self, since: int) -> tuple[State, list[tuple[int, RowNumbers]]]:
        """The present state, and the rows (segment, rows) that died after generation ``since``."""
        with self.snapshot():
            state = self._read_state()
            found = self.db.execute(
                "SELECT segment, rows, crc FROM deaths WHERE generation > ?", (since,)
            )
            return state, [(number, self._rows(number, blob, crc)) for number, blob, crc in found]

    def applied(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of ``keys`` (``shard_key``) whose shards were applied."""
        found: set[bytes] = set()
        with self.translated():
            for start in range(0, len(keys), 500):
                some = keys[start : start + 500]
                marks = ",".join("?" * len(some))
                query = f"SELECT key FROM applied WHERE key IN ({marks})"
                found.update(row[0] for row in self.db.execute(query, some))
        return found

    def check(self) -> None:
        """Read everything once; raises ``CorruptManifest`` for any damage that matters."""
        self.check_schema(_SCHEMA)
        with self.snapshot():
            for table in ("state", "segments", "deaths", "templates", "indexes"):
                fault = self.db.execute(f"PRAGMA quick_check({table})").fetchone()[0]
                if fault != "ok":
                    raise self.corrupt(str(fault))
            self._read_state()
            for row in self.db.execute("SELECT segment, rows, crc FROM deaths"):
                self._rows(*row)
            if self._seal() != self._state_record()["seal"]:
                raise self.corrupt("rows are missing")

    def commit(self, token: int, change: Change, crash: CrashPoint = no_crash) -> State:
        """Make ``change`` true, all of it or nothing, and return the new state.

        Raises ``StaleWriter`` when another writer has taken over, ``Unavailable`` when the disk is
        full; nothing has changed then.
        """
        with self.transaction():
            record = self._state_record()
            if record["token"] != token:
                raise StaleWriter()
            record["generation"] += 1
            seal = record["seal"] ^ self._write(change, record["generation"])
            if change.add_segments:
                newest = max(entry.number for entry in change.add_segments)
                record["next_number"] = max(record["next_number"], newest + 1)
            if change.watermark is not None:
                record["watermark"] = max(record["watermark"], change.watermark)
            self._put_state({**record, "seal": seal})
            state = self._read_state()
            crash("before commit")
        crash("committed")
        if self._mark is not None:
            self._mark.put(state.generation)
        return state

    @contextmanager
    def held(self, token: int) -> Iterator[None]:
        """Nobody takes the partition over meanwhile; raises ``StaleWriter`` where somebody has."""
        with self.transaction():
            if self._state_record()["token"] != token:
                raise StaleWriter()
            yield

    # -- inside a transaction -------------------------------------------------------------------

    def _write(self, change: Change, generation: int) -> int:
        """Write all rows of ``change``; returns what the seal changes by."""
        seal = 0
        for number in change.remove_segments:
            seal ^= self._remove("segments", "number", number)
            seal ^= self._remove("indexes", "segment", number)
            seal ^= self._remove_deaths(number)
        for entry in change.replace_segments:
            seal ^= self._remove("segments", "number", entry.number)
        for entry in [*change.add_segments, *change.replace_segments]:
            seal ^= self._put("segments", entry.number, astuple(entry))
        for number, rows in change.deaths.items():
            seal ^= self._put_deaths(number, generation, rows)
        for digest in change.remove_templates:
            seal ^= self._remove("templates", "hash", digest)
        for template in change.add_templates:
            seal ^= self._remove("templates", "hash", template.hash)
            seal ^= self._put("templates", template.hash, astuple(template))
        for number in change.remove_indexes:
            seal ^= self._remove("indexes", "segment", number)
        for index in change.put_indexes:
            seal ^= self._remove("indexes", "segment", index.segment)
            seal ^= self._put("indexes", index.segment, astuple(index))
        self._remember(change.shard_keys)
        return seal

    def _put(self, table: str, key: int | str, record: tuple[Any, ...]) -> int:
        blob = _sealed(record)
        self.db.execute(f"INSERT INTO {table} VALUES (?, ?)", (key, blob))
        return zlib.crc32(blob)

    def _remove(self, table: str, column: str, key: int | str) -> int:
        query = f"DELETE FROM {table} WHERE {column} = ? RETURNING record"
        return _xor(zlib.crc32(blob) for (blob,) in self.db.execute(query, (key,)).fetchall())

    def _put_deaths(self, number: int, generation: int, rows: RowNumbers) -> int:
        seal = 0
        count = self.db.execute("SELECT count(*) FROM deaths WHERE segment = ?", (number,))
        if count.fetchone()[0] >= FOLD_DELTAS:
            # A reader that follows reads the fold as one delta more; dying twice does not matter.
            older = self.db.execute("SELECT rows, crc FROM deaths WHERE segment = ?", (number,))
            rows = np.unique(np.concatenate([rows, *(self._rows(number, *row) for row in older)]))
            seal ^= self._remove_deaths(number)
        blob = rows.astype("<u4").tobytes()
        crc = _death_crc(number, blob)
        self.db.execute("INSERT INTO deaths VALUES (?, ?, ?, ?)", (number, generation, blob, crc))
        return seal ^ crc

    def _remove_deaths(self, number: int) -> int:
        query = "DELETE FROM deaths WHERE segment = ? RETURNING crc"
        return _xor(crc for (crc,) in self.db.execute(query, (number,)).fetchall())

    def _remember(self, keys: Sequence[bytes]) -> None:
        self.db.executemany("INSERT INTO applied (key) VALUES (?)", ((key,) for key in keys))
        first, last = self.db.execute("SELECT min(sequence), max(sequence) FROM applied").fetchone()
        if last is not None and last - first > MAX_APPLIED + PRUNE_SLACK:
            self.db.execute("DELETE FROM applied WHERE sequence <= ?", (last - MAX_APPLIED,))

    def _has_tables(self) -> bool:
        query = "SELECT count(*) FROM sqlite_master WHERE name = 'state'"
        return bool(self.db.execute(query).fetchone()[0])

    def _create(self, spec: PartitionSpec, token: int) -> None:
        for statement in _SCHEMA.split(";"):
            self.db.execute(statement)
        record = {"token": token, "generation": 0, "next_number": 1, "watermark": 0, "seal": 0}
        self._put_state({**record, "spec": astuple(spec)})

    def _take_over(self, spec: PartitionSpec, token: int) -> None:
        with self.transaction():
            record = self._state_record()
            held = PartitionSpec(*record["spec"])
            if (held.uid, held.space, held.dimension) != (spec.uid, spec.space, spec.dimension):
                raise SpaceMismatch(
                    f"the partition holds {held.dimension} dimensions of space {held.space}, "
                    f"not {spec.dimension} of {spec.space}"
                )
            if record["token"] > token:
                raise StaleWriter()
            if self._mark is not None and record["generation"] < self._mark.generation:
                raise self.corrupt(
                    f"it ends with generation {record['generation']}, but "
                    f"{self._mark.generation} was committed: its log is damaged"
                )
            self._put_state({**record, "token": token, "spec": astuple(spec)})

    def _put_state(self, record: dict[str, Any]) -> None:
        self.db.execute("INSERT OR REPLACE INTO state VALUES (1, ?)", (_sealed(record),))

    def _state_record(self) -> dict[str, Any]:
        row = self.db.execute("SELECT record FROM state").fetchone()
        if row is None:
            raise self.corrupt("its state is missing")
        record: dict[str, Any] = self._unsealed(row[0])
        return record

    def _read_state(self) -> State:
        record = self._state_record()
        segments = [SegmentEntry(*entry) for entry in self._records("segments")]
        return State(
            spec=PartitionSpec(*record["spec"]),
            generation=record["generation"],
            token=record["token"],
            next_number=record["next_number"],
            watermark=record["watermark"],
            segments=tuple(sorted(segments, key=lambda entry: entry.sequence)),
            templates=tuple(Template(*entry) for entry in self._records("templates")),
            indexes=tuple(IndexEntry(*entry) for entry in self._records("indexes")),
        )

    def _records(self, table: str) -> Iterator[Any]:
        for (blob,) in self.db.execute(f"SELECT record FROM {table}"):
            yield self._unsealed(blob)

    def _seal(self) -> int:
        """What the seal has to be, from all rows."""
        seal = 0
        for table in ("segments", "templates", "indexes"):
            for (blob,) in self.db.execute(f"SELECT record FROM {table}"):
                seal ^= zlib.crc32(blob)
        for (crc,) in self.db.execute("SELECT crc FROM deaths"):
            seal ^= crc
        return seal

    def _rows(self, number: int, blob: bytes, crc: int) -> RowNumbers:
        if _death_crc(number, blob) != crc:
            raise self.corrupt("a list of dead rows does not match its checksum")
        return np.frombuffer(blob, "<u4").astype(np.int64)

    def _unsealed(self, blob: bytes) -> Any:
        if zlib.crc32(blob[4:]).to_bytes(4, "little") != blob[:4]:
            raise self.corrupt("a record does not match its checksum")
        return msgpack.unpackb(blob[4:])


def _sealed(record: Any) -> bytes:
    packed: bytes = msgpack.packb(record)
    return zlib.crc32(packed).to_bytes(4, "little") + packed


def _xor(numbers: Iterator[int]) -> int:
    result = 0
    for number in numbers:
        result ^= number
    return result


def _death_crc(number: int, blob: bytes) -> int:
    return zlib.crc32(blob, number & 0xFFFFFFFF)
