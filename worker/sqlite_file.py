"""One SQLite file in WAL mode, durable at each commit, whose errors are ours."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgpack

from vecfleet.common.errors import CorruptManifest, Unavailable

BUSY_TIMEOUT_S = 10.0
CACHE_KIB = 1024
_SCHEMA = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"
_PASSING = frozenset(  # what may be otherwise a moment later; any other error is damage
    (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PROTOCOL,
    )
)


class SqliteFile:
    """A connection; its owner uses it from one thread at a time.

    Every method may raise ``Unavailable`` (a full disk, a lock) or ``CorruptManifest``, which names
    the file.
    """

    def __init__(self, path: Path) -> None:
        """Connect to ``path``, creating it where there is none."""
        self.path = path
        with self.translated():
            self.db = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            try:
                self.db.execute("PRAGMA journal_mode = WAL")
                self.db.execute("PRAGMA synchronous = FULL")
                self.db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            except BaseException:
                self.db.close()
                raise

    def close(self) -> None:
        """Close the connection."""
        self.db.close()

    def check_schema(self, script: str) -> None:
        """Raise ``CorruptManifest`` unless the tables and indexes are those that ``script`` makes.

        SQLite takes whatever text it finds for what was meant: a damaged PRIMARY KEY is none.
        """
        with closing(sqlite3.connect(":memory:")) as made:
            made.executescript(script)
            meant = made.execute(_SCHEMA).fetchall()
        with self.translated():
            if self.db.execute(_SCHEMA).fetchall() != meant:
                raise self.corrupt("its tables are others")

    def corrupt(self, what: str) -> CorruptManifest:
        """The error for damage, naming the file."""
        return CorruptManifest(f"{self.path}: {what}")

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Errors of sqlite3, and of rows that do not unpack, as ours."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if _code_of(error) & 0xFF in _PASSING:
                raise Unavailable(f"{self.path} cannot be used now: {error}") from error
            raise self.corrupt(str(error)) from error
        except (
            sqlite3.DatabaseError,
            msgpack.UnpackException,
            TypeError,
            ValueError,
            KeyError,
        ) as error:
            raise self.corrupt(str(error)) from error

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything read inside is of one moment."""
        with self.translated():
            self.db.execute("BEGIN")
            try:
                yield
            finally:
                self.db.execute("ROLLBACK")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and no other writer meanwhile."""
        with self.translated():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise


def is_undone(error: BaseException) -> bool:
    """Whether the commit that failed with ``error`` can in no case turn out to be true later."""
    cause = error.__cause__
    return not isinstance(cause, sqlite3.Error) or _code_of(cause) in (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_BUSY,
    )


def _code_of(error: sqlite3.Error) -> int:
    """SQLite's; Python's own errors, as of text that is no UTF-8, have none and tell of damage."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
