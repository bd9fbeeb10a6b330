"""API keys, good and bad, of two tenants; and what of the one the other must never see."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote_to_bytes

from vecfleet.common.api_keys import SCOPES, add_key, new_key, remove_key

if TYPE_CHECKING:
    from fuzz.corpus import Request
    from fuzz.wire import Answer

OPEN_PATHS = ("/health", "/live")
OPERATORS_PATHS = ("/metrics",)  # they tell of the whole fleet: only to the default tenant's admin
MINE, RIVAL = "acme", "rival"
CANARY = "c4n4ry"  # in every text, id and metadata of the rival's
RIVALS_COLLECTION = f"{CANARY}-books"
_SENT_WITH = ("authorization", "x-api-key")


@dataclass(frozen=True)
class Key:
    """What a request is sent with; ``shown`` None: nothing."""

    kind: str
    shown: str | None = field(repr=False)
    scopes: frozenset[str] = frozenset()
    is_good: bool = False

    def headers(self, generator: random.Random | None = None) -> dict[str, str]:
        """In one of the two headers that carry a key."""
        if self.shown is None:
            return {}
        if generator is not None and generator.random() < 0.5:
            return {"x-api-key": self.shown}
        return {"authorization": f"Bearer {self.shown}"}


@dataclass
class Keyring:
    """The keys of a gateway, and the secrets of the rival."""

    mine: Key
    rival: Key
    others: list[Key]  # of single scopes, expired, revoked, broken, none
    secrets: set[str] = field(default_factory=lambda: {CANARY})

    def sent(self, requests: Iterable[Request], seed: int) -> Iterator[Request]:
        """``requests``, each with a key; some reach for what is the rival's."""
        generator = random.Random(f"keys/{seed}")
        for request in requests:
            key = self.mine if generator.random() < 0.6 else generator.choice(self.others)
            if request.method != "PUT" and generator.random() < 0.2:  # what one makes is one's own
                target = _reaching(request.target, sorted(self.secrets), generator)
                request = replace(request, target=target)
            yield self.signed(request, key, generator)

    @staticmethod
    def signed(request: Request, key: Key, generator: random.Random | None = None) -> Request:
        """``request`` with ``key`` and no other."""
        kept = {k: v for k, v in request.headers.items() if k.lower() not in _SENT_WITH}
        headers = {**kept, **key.headers(generator)}
        origin = f"{key.kind}, {request.origin}"
        return replace(request, headers=headers, key=key, origin=origin)

    def leaked(self, request: Request, answer: Answer) -> str:
        """A secret of the rival's that ``answer`` holds and ``request`` did not; else ""."""
        said = unquote_to_bytes(request.target) + (request.body or b"")
        said += "".join(request.headers.values()).encode("latin-1", "replace")
        heard = answer.body + "".join(answer.headers.values()).encode("latin-1", "replace")
        found = (s for s in self.secrets if s.encode() in heard and s.encode() not in said)
        return next(found, "")


def _reaching(target: str, wanted: Sequence[str], generator: random.Random) -> str:
    """``target`` with a name of the rival's in place of what a path holds."""
    path, mark, query = target.partition("?")
    parts = path.split("/")
    if parts[1:2] == ["dead"] and len(parts) > 2:
        parts[2] = quote(generator.choice(wanted), safe="")
    elif len(parts) > 2 and parts[1] in ("collections", "submissions"):
        parts[2] = quote(generator.choice([RIVALS_COLLECTION, *wanted]), safe="")
    return "/".join(parts) + mark + query


def make_keys(path: Path) -> Keyring:
    """A key file at ``path`` with good, narrow and expired keys of two tenants."""
    narrow = [_made(path, MINE, f"a key for {scope}", [scope]) for scope in SCOPES]
    expired = _made(path, MINE, "an expired key", SCOPES, expires_at=int(time.time()) - 10)
    revoked = _made(path, MINE, "a revoked key", SCOPES)
    assert revoked.shown is not None
    remove_key(path, revoked.shown.split("_")[1])
    mine, rival = _made(path, MINE, "a full key", SCOPES), _made(path, RIVAL, "rival", SCOPES)
    shown = mine.shown or ""
    broken = [
        shown[:-1],
        shown + "0",
        shown.upper(),
        shown[:16] + secrets.token_hex(32),
        f"{shown},{rival.shown}",
        "vf_" + "0" * 12 + "_" + "0" * 64,
        "",
        "x" * 5000,
        "\xff" * 20,
    ]
    bad = [replace(expired, is_good=False), replace(revoked, is_good=False)]
    bad += [Key("a broken key", one) for one in broken]
    return Keyring(mine, rival, [*narrow * 2, *bad, Key("no key", None)])


def _made(
    path: Path, tenant: str, kind: str, scopes: Sequence[str], expires_at: int | None = None
) -> Key:
    shown, entry = new_key(tenant, scopes, expires_at=expires_at)
    add_key(path, entry)
    return Key(kind, shown, frozenset(scopes), is_good=True)
