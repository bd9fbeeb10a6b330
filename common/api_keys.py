"""API keys: what one looks like, who it stands for, and the file that holds their digests.

A key is ``vf_{id}_{secret}``: 12 hex digits that may be shown, and 256 random bits in hex that are
shown once. The file holds the SHA-256 of the whole key. A slow, salted hash guards passwords that
people think up; nobody guesses 256 random bits, and a quick hash costs a request a microsecond.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from vecfleet.common.errors import ConfigError, InvalidName, NotFound
from vecfleet.common.keys import DEFAULT_TENANT
from vecfleet.common.names import check_tenant

Scope = Literal["embed", "rerank", "ingest", "search", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_KEY = re.compile(r"vf_([0-9a-f]{12})_[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{12}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE_VERSION = 1
_NEW_FILE = os.O_CREAT | os.O_EXCL | os.O_WRONLY
_MAX_NOTE_LENGTH = 200
_NOBODY = "0" * 64  # the digest that an unknown id is compared with
_REQUIRED = {"id", "sha256", "tenant", "scopes", "created_at"}


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key as the file has it: all but the key itself."""

    id: str
    sha256: str = field(repr=False)
    tenant: str
    scopes: tuple[Scope, ...]
    created_at: int  # Unix time
    expires_at: int | None = None
    note: str = ""

    def is_expired(self, now_s: float) -> bool:
        """Whether it is of no use any more."""
        return self.expires_at is not None and now_s >= self.expires_at


def new_key(
    tenant: str = DEFAULT_TENANT,
    scopes: Iterable[str] = SCOPES,
    *,
    expires_at: int | None = None,
    note: str = "",
) -> tuple[str, ApiKey]:
    """A fresh key, to be shown once, and its entry. Raises ``ConfigError`` for a bad scope."""
    key_id = secrets.token_hex(6)
    shown = f"vf_{key_id}_{secrets.token_hex(32)}"
    entry = {
        "id": key_id,
        "sha256": digest(shown),
        "tenant": tenant,
        "scopes": list(scopes),
        "created_at": int(time.time()),
        "expires_at": expires_at,
        "note": note,
    }
    return shown, _checked(entry)


def digest(shown: str) -> str:
    """What the file holds of a key."""
    return hashlib.sha256(shown.encode()).hexdigest()


def id_of(shown: str) -> str:
    """The id of what has a key's form, to be named in a log; of anything else nothing."""
    found = _KEY.fullmatch(shown)
    return found[1] if found else ""


class KeySet:
    """The keys of one reading of the file."""

    def __init__(self, entries: Iterable[ApiKey] = ()) -> None:
        self.entries = tuple(entries)
        self._by_id = {entry.id: entry for entry in self.entries}

    def find(self, shown: str, now_s: float | None = None) -> ApiKey | None:
        """The entry of a key that is good now; compared in constant time."""
        entry = self._by_id.get(id_of(shown))
        expected = entry.sha256 if entry is not None else _NOBODY
        is_same = hmac.compare_digest(digest(shown), expected)
        if entry is None or not is_same or entry.is_expired(now_s or time.time()):
            return None
        return entry

    def tenants(self) -> list[str]:
        """Everybody who has a key."""
        return sorted({entry.tenant for entry in self.entries})


def read_keys(path: Path) -> KeySet:
    """The keys in a file; raises ``ConfigError`` that quotes nothing of it."""
    try:
        mode = path.stat().st_mode
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be read: {error.strerror}") from None
    if mode & stat.S_IWOTH:
        raise ConfigError(f"anybody may write the key file {path}; take that right away")
    try:
        told = json.loads(raw)
    except ValueError:
        raise ConfigError(f"the key file {path} is not valid JSON") from None
    if not isinstance(told, dict) or told.get("version") != _FILE_VERSION:
        raise ConfigError(f"the key file {path} is not of version {_FILE_VERSION}")
    rows = told.get("keys")
    if not isinstance(rows, list):
        raise ConfigError(f"the key file {path} has no list of keys")
    entries = []
    for place, row in enumerate(rows):
        try:
            entries.append(_checked(row))
        except ConfigError as error:
            raise ConfigError(f"the key file {path}, keys[{place}]: {error}") from None
    if len({entry.id for entry in entries}) != len(entries):
        raise ConfigError(f"the key file {path} has two keys of one id")
    return KeySet(entries)


def add_key(path: Path, entry: ApiKey) -> None:
    """Put a key into the file, which is made where there is none."""
    with _changed(path) as entries:
        entries.append(entry)


def remove_key(path: Path, key_id: str) -> None:
    """Take a key out of the file; raises ``NotFound``."""
    with _changed(path) as entries:
        kept = [entry for entry in entries if entry.id != key_id]
        if len(kept) == len(entries):
            raise NotFound(f"there is no key {key_id!r} in {path}")
        entries[:] = kept


@contextmanager
def _changed(path: Path) -> Iterator[list[ApiKey]]:
    """The entries, to be changed; written as a whole, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = list(read_keys(path).entries) if path.exists() else []
        yield entries
        rows = [asdict(entry) for entry in entries]
        fresh = path.with_name(path.name + ".new")
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, _NEW_FILE, 0o600), "w") as file:
            json.dump({"version": _FILE_VERSION, "keys": rows}, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise ConfigError(f"the key file {path} cannot be written: {error.strerror}") from None
    finally:
        os.close(lock)


def check_scopes(scopes: Iterable[object]) -> tuple[Scope, ...]:
    """The scopes, in their usual order; raises ``ConfigError`` for none or an unknown one."""
    given = set(scopes)
    unknown = [str(scope) for scope in given if scope not in SCOPES]
    if unknown or not given:
        raise ConfigError(f"scopes are one or more of {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in given)


def _checked(row: Any) -> ApiKey:
    """An entry from its plain form; raises ``ConfigError`` that says what is wrong with it."""
    known = set(ApiKey.__dataclass_fields__)
    if not isinstance(row, dict) or not row.keys() >= _REQUIRED or not row.keys() <= known:
        raise ConfigError(f"an entry has the fields {', '.join(sorted(known))}")
    if not _matches(_ID, row["id"]) or not _matches(_DIGEST, row["sha256"]):
        raise ConfigError("id is 12 and sha256 64 hex digits")
    try:
        tenant = check_tenant(row["tenant"])
    except InvalidName as error:
        raise ConfigError(error.message) from None
    if not isinstance(row["scopes"], list | tuple):
        raise ConfigError("scopes is a list")
    note, expires_at = row.get("note", ""), row.get("expires_at")
    if not isinstance(note, str) or len(note) > _MAX_NOTE_LENGTH or not note.isprintable():
        raise ConfigError(f"note is a line of at most {_MAX_NOTE_LENGTH} characters")
    for name, value in (("created_at", row["created_at"]), ("expires_at", expires_at)):
        is_time = isinstance(value, int) and not isinstance(value, bool)
        if not is_time and not (name == "expires_at" and value is None):
            raise ConfigError(f"{name} is a Unix time")
    hashable = [scope for scope in row["scopes"] if isinstance(scope, str)]
    if len(hashable) != len(row["scopes"]):
        raise ConfigError(f"scopes are one or more of {', '.join(SCOPES)}")
    return ApiKey(
        row["id"],
        row["sha256"],
        tenant,
        check_scopes(hashable),
        row["created_at"],
        cast("int | None", expires_at),
        note,
    )


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
