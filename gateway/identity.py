"""Who a request comes from: the API key in its headers."""

from __future__ import annotations

from collections.abc import Iterable

from vecfleet.common.api_keys import id_of
from vecfleet.common.errors import Forbidden, Unauthorized
from vecfleet.gateway.caller import ANYBODY, NOBODY, Caller
from vecfleet.gateway.context import RequestContext
from vecfleet.gateway.keyring import Keyring
from vecfleet.gateway.origin import Header, fault_in

OPEN_PATHS = frozenset(("/health", "/live"))  # for probes, which have no key

_MAX_KEY_BYTES = 256


def identify(
    headers: Iterable[Header],
    path: str,
    keyring: Keyring | None,
    context: RequestContext,
    *,
    is_local: bool,
) -> Caller:
    """The caller of a request; raises ``Unauthorized`` where a key is asked for and none is good.

    Without keys (``keyring`` None) it raises ``Forbidden`` for what another site's page has sent;
    ``is_local``: the gateway listens on the loopback address.
    ``context`` learns the id of the key, for the access line, and nothing else of what was sent.
    """
    if keyring is None:
        fault = fault_in(headers, is_local=is_local)
        if not fault:
            return ANYBODY
        if path in OPEN_PATHS:
            return NOBODY
        raise Forbidden(fault)
    given = {key for header in headers if (key := _key_in(header)) is not None}
    if len(given) == 1:
        shown = given.pop()
        context.key_id = id_of(shown)
        entry = keyring.find(shown)
        if entry is not None:
            return Caller(entry.tenant, frozenset(entry.scopes), entry.id)
    if path in OPEN_PATHS:
        return NOBODY
    raise Unauthorized("send one API key, not several" if given else "")


def _key_in(header: Header) -> str | None:
    """The key in a header, "" for what can be none; None where the header carries no key."""
    name, value = header
    if name == b"x-api-key":
        key = value.strip()
    elif name == b"authorization":
        scheme, _, key = value.strip().partition(b" ")
        if scheme.lower() != b"bearer":
            return None  # a proxy's own, such as Basic
        key = key.strip()
    else:
        return None
    return key.decode() if len(key) <= _MAX_KEY_BYTES and key.isascii() else ""
