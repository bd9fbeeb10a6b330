"""The truth about the collections on this node; what Redis holds is a copy.

``<root>/catalog.db`` has one row a collection; ``<root>/<uid>/<partition>/`` holds a partition. The
directory is named by the uid alone, never by what a client chose. A deletion is true once the row
is gone; the files follow when nobody uses them any more, at the latest at the next start.

SQLite has no checksums: the table ``seal`` carries a digest of all rows, and the generation that
the mark beside the file (commit_mark.py) tells too. So a flipped bit, a lost row and a file that
went back are noticed when the catalogue is opened.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from threading import RLock

import msgpack

from vecfleet.common.collection import Collection, CollectionSpec
from vecfleet.common.errors import (
    CollectionConflict,
    InvalidName,
    StaleWriter,
    Unavailable,
    UnknownCollection,
)
from vecfleet.common.keys import DEFAULT_HOME, DEFAULT_TENANT, SUBMISSION_TTL_S
from vecfleet.common.names import check_name, new_id
from vecfleet.worker.commit_mark import CommitMark
from vecfleet.worker.disk_reserve import DiskReserve
from vecfleet.worker.partition_state import PartitionSpec
from vecfleet.worker.sqlite_file import SqliteFile

INDEX_FOLDER = "index"  # below the data folder
FILE_NAME = "catalog.db"
_REMEMBERED_S = 2 * SUBMISSION_TTL_S  # a deletion; nothing comes so long after it
_UID = re.compile(r"[0-9a-f]{32}")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS collections (uid TEXT PRIMARY KEY, tenant TEXT NOT NULL,
    name TEXT NOT NULL, record BLOB NOT NULL, UNIQUE (tenant, name));
CREATE TABLE IF NOT EXISTS deleted (uid TEXT PRIMARY KEY, tenant TEXT NOT NULL,
    name TEXT NOT NULL, asked_us INTEGER NOT NULL, deleted_s REAL NOT NULL,
    removed INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS tenants (tenant TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS fence (one INTEGER PRIMARY KEY CHECK (one = 1),
    token INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS seal (one INTEGER PRIMARY KEY CHECK (one = 1),
    generation INTEGER NOT NULL, digest BLOB NOT NULL);
INSERT OR IGNORE INTO tenants SELECT DISTINCT tenant FROM collections;
"""


class Catalog:
    """The collections of one aggregator; safe to use from several threads."""

    def __init__(
        self,
        root: Path,
        file: SqliteFile,
        mark: CommitMark,
        home: str,
        token: int | None,
        reserve: DiskReserve,
    ) -> None:
        """Use ``open``."""
        self._reserve = reserve
        self._token = token
        self.root = root
        self._file = file
        self._mark = mark
        self._db = file.db
        self.home = home
        self._lock = RLock()

    @classmethod
    def open(cls, root: Path, home: str = DEFAULT_HOME, token: int | None = None) -> Catalog:
        """Open the catalogue in ``root``, creating both, and finish interrupted deletions.

        ``token`` is the fencing token of the writer's lease, compared inside every change; None for
        who knows that nobody else writes. Raises ``CorruptManifest`` naming the file,
        ``StaleWriter`` when a later holder of the lease has been here, ``Unavailable``.
        """
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"{root} cannot be made: {error.strerror}") from error
        reserve = DiskReserve(root)
        return reserve.in_need(lambda: cls._open(root, home, token, reserve))

    @classmethod
    def _open(cls, root: Path, home: str, token: int | None, reserve: DiskReserve) -> Catalog:
        mark = CommitMark(root / FILE_NAME)
        try:
            file = SqliteFile(root / FILE_NAME)
        except BaseException:
            mark.close()
            raise
        try:
            with file.translated():
                file.db.executescript(_SCHEMA)
                fault = file.db.execute("PRAGMA quick_check(1)").fetchone()[0]
                if fault != "ok":
                    raise file.corrupt(fault)
            file.check_schema(_SCHEMA)
            catalog = cls(root, file, mark, home, token, reserve)
            catalog._check_seal()
            catalog._take_over()
            catalog.remove_deleted()
        except BaseException:
            file.close()
            mark.close()
            raise
        return catalog

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            self._file.close()
            self._mark.close()

    def check_writer(self) -> None:
        """Raise ``StaleWriter`` when a later holder of the lease has taken the catalogue over."""
        with self._used():
            if self._token not in (None, self._fence()):
                raise StaleWriter()

    def create(self, name: str, spec: CollectionSpec, tenant: str = DEFAULT_TENANT) -> Collection:
        """The collection of this name, made if there is none.

        Raises ``InvalidName``, an ``InvalidInput`` for a spec that is not valid, and
        ``CollectionConflict`` when the name is taken by one with another spec.
        """
        check_name(name)
        spec.checked()
        with self._used():
            found = self._find("tenant = ? AND name = ?", tenant, name)
            if found is None:
                found = Collection(name, new_id(), spec, tenant, self.home, created_s=time.time())
                row = (found.uid, tenant, name, msgpack.packb(found.to_wire()))
                with self._changed():
                    self._db.execute("INSERT INTO collections VALUES (?, ?, ?, ?)", row)
                    self._db.execute("INSERT OR IGNORE INTO tenants VALUES (?)", (tenant,))
            elif found.spec != spec:
                raise _conflict(name, found.spec, spec)
            return found

    def get(self, name: str, tenant: str = DEFAULT_TENANT) -> Collection:
        """The collection of this name; raises ``UnknownCollection``."""
        check_name(name)
        with self._used():
            found = self._find("tenant = ? AND name = ?", tenant, name)
        if found is None:
            raise UnknownCollection(f"there is no collection {name}")
        return found

    def by_uid(self, uid: str) -> Collection | None:
        """The collection of this uid, or None: it was deleted, or never was."""
        with self._used():
            return self._find("uid = ?", uid)

    def was_deleted(self, uid: str) -> bool:
        """Whether a collection of this uid was here and was deleted."""
        with self._used():
            query = "SELECT count(*) FROM deleted WHERE uid = ?"
            return bool(self._db.execute(query, (uid,)).fetchone()[0])

    def was_deleted_between(self, name: str, tenant: str, after_us: int, until_us: int) -> bool:
        """Whether a deletion of this name is true that was asked for between two times of Redis."""
        with self._used():
            query = (
                "SELECT count(*) FROM deleted WHERE tenant = ? AND name = ? "
                "AND asked_us > ? AND asked_us <= ?"
            )
            found = self._db.execute(query, (tenant, name, after_us, until_us)).fetchone()
            return bool(found[0])

    def deleted(self, since_s: float) -> dict[str, str]:
        """The tenants, by uid, of collections that were deleted after ``since_s``, a Unix time.

        The oldest first.
        """
        with self._used():
            query = "SELECT uid, tenant FROM deleted WHERE deleted_s >= ? ORDER BY deleted_s"
            return dict(self._db.execute(query, (since_s,)).fetchall())

    def deleted_s(self, uid: str) -> float:
        """When this collection was deleted, Unix time; 0.0 where nobody knows any more."""
        with self._used():
            row = self._db.execute("SELECT deleted_s FROM deleted WHERE uid = ?", (uid,)).fetchone()
        return 0.0 if row is None else float(row[0])

    def tenants(self) -> frozenset[str]:
        """All tenants that have or had a collection here, and the default one."""
        with self._used():
            rows = self._db.execute("SELECT tenant FROM tenants").fetchall()
        return frozenset({DEFAULT_TENANT, *(tenant for (tenant,) in rows)})

    def list(self, tenant: str | None = None) -> list[Collection]:
        """All collections, or one tenant's, by name."""
        with self._used():
            query = "SELECT record FROM collections WHERE ? IS NULL OR tenant = ? ORDER BY name"
            rows = self._db.execute(query, (tenant, tenant)).fetchall()
        return [Collection.from_wire(msgpack.unpackb(record)) for (record,) in rows]

    def delete(self, name: str, tenant: str = DEFAULT_TENANT, asked_us: int = 0) -> Collection:
        """Delete the collection of this name; raises ``UnknownCollection``.

        The name is free at once; the uid never returns. ``remove_deleted`` removes the files.
        ``asked_us`` is when it was asked for, in microseconds of Redis's clock.
        """
        with self._used():
            found = self.get(name, tenant)
            self._reserve.in_need(lambda: self._note_deleted(found, asked_us))
        return found

    def _note_deleted(self, gone: Collection, asked_us: int) -> None:
        with self._changed():
            self._db.execute("DELETE FROM collections WHERE uid = ?", (gone.uid,))
            row = (gone.uid, gone.tenant, gone.name, asked_us, time.time())
            self._db.execute("INSERT OR REPLACE INTO deleted VALUES (?, ?, ?, ?, ?, 0)", row)
            old = (time.time() - _REMEMBERED_S,)
            self._db.execute("DELETE FROM deleted WHERE removed = 1 AND deleted_s < ?", old)

    def remove_deleted(self) -> None:
        """Remove the files of deleted collections, whose writers must be closed.

        What cannot be removed now is there for the next call. Fills the reserve of the disk again.
        """
        with self._used():
            for (uid,) in self._db.execute("SELECT uid FROM deleted WHERE removed = 0").fetchall():
                directory = self._home_of(uid)
                # Out of the way in one step: a search that begins meanwhile finds it or not.
                leaving = directory.with_name(f"{uid}.deleted")
                if directory.is_symlink():
                    directory.unlink()
                elif directory.exists() and not leaving.exists():
                    directory.rename(leaving)
                shutil.rmtree(leaving, ignore_errors=True)
                if not directory.exists() and not leaving.exists():
                    self._db.execute("UPDATE deleted SET removed = 1 WHERE uid = ?", (uid,))
            if self._token is not None:
                self._reserve.fill()

    def directory(self, collection: Collection, partition: int = 0) -> Path:
        """Where a partition lives; it need not exist yet."""
        return self._home_of(collection.uid) / str(int(partition))

    def _home_of(self, uid: str) -> Path:
        if not _UID.fullmatch(uid):
            raise InvalidName("a collection's uid is 32 hex digits", field="uid")
        return self.root / uid

    def _find(self, where: str, *values: str) -> Collection | None:
        row = self._db.execute(f"SELECT record FROM collections WHERE {where}", values).fetchone()
        return None if row is None else Collection.from_wire(msgpack.unpackb(row[0]))

    def _check_seal(self) -> None:
        """Raise ``CorruptManifest`` unless all is there that was ever committed."""
        with self._used():
            row = self._db.execute("SELECT generation, digest FROM seal").fetchone()
            if row is None and self._mark.generation:
                raise self._file.corrupt("its collections are gone")
            if row is None:
                with self._changed(taking_over=True):
                    return  # it is new
            generation, digest = row
            if digest != self._digest(generation):
                raise self._file.corrupt("its rows do not match their digest")
            if generation < self._mark.generation:
                raise self._file.corrupt(
                    f"it ends with generation {generation}, but {self._mark.generation} was "
                    "committed: its log is damaged"
                )

    def _take_over(self) -> None:
        with self._used():
            if self._token is None or self._fence() == self._token:
                return
            with self._changed(taking_over=True):
                self._db.execute("INSERT OR REPLACE INTO fence VALUES (1, ?)", (self._token,))

    def _fence(self) -> int:
        """The token of who has taken the catalogue over last; 0 where nobody has."""
        row = self._db.execute("SELECT token FROM fence").fetchone()
        return 0 if row is None else int(row[0])

    @contextmanager
    def _changed(self, *, taking_over: bool = False) -> Iterator[None]:
        """One change of the rows, sealed and marked; by nobody whose lease another one has."""
        with self._file.transaction():
            fence = self._fence()
            if self._token is not None and (
                fence > self._token if taking_over else fence != self._token
            ):
                raise StaleWriter()
            yield
            last = self._db.execute("SELECT max(generation) FROM seal").fetchone()[0] or 0
            row = (last + 1, self._digest(last + 1))
            self._db.execute("INSERT OR REPLACE INTO seal VALUES (1, ?, ?)", row)
        self._mark.put(last + 1)

    def _digest(self, generation: int) -> bytes:
        """What the seal of the present rows has to be."""
        digest = blake2b(b"%d" % generation, digest_size=16)
        for query in (
            "SELECT uid, tenant, name, record FROM collections ORDER BY uid",
            "SELECT uid, tenant, name, asked_us, deleted_s FROM deleted ORDER BY uid",
            "SELECT tenant FROM tenants ORDER BY tenant",
        ):
            digest.update(msgpack.packb(self._db.execute(query).fetchall()))
        if fence := self._fence():
            digest.update(b"%d" % fence)
        return digest.digest()

    @contextmanager
    def _used(self) -> Iterator[None]:
        with self._lock, self._file.translated():
            yield


def _conflict(name: str, has: CollectionSpec, asked: CollectionSpec) -> CollectionConflict:
    """The error that names the settings that differ; its field is the first of them."""
    wanted = asked.to_wire()
    differ = {field: value for field, value in has.to_wire().items() if wanted[field] != value}
    what = ", ".join(f"{field} {value}, not {wanted[field]}" for field, value in differ.items())
    return CollectionConflict(f"collection {name} has {what}", field=next(iter(differ)))


def partition_spec(collection: Collection) -> PartitionSpec:
    """What the writer of one of the collection's partitions is opened with."""
    spec = collection.spec
    return PartitionSpec(
        uid=collection.uid,
        space=spec.space,
        dimension=spec.dimension,
        policy=spec.policy,
        recall_target=spec.recall_target,
    )
