"""Requests that somebody else's web page has a browser send to a gateway without keys.

Such a gateway trusts whoever reaches it, and a browser on the same machine reaches it for every
page that it shows. A page may send a form anywhere, and with a name of its own that it lets point
to 127.0.0.1 (DNS rebinding) it may read the answers too. Two headers tell, that a page cannot
choose: ``Origin`` says whose page it is, ``Host`` by which name it came.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from vecfleet.gateway.config import is_loopback

_MAX_HOST_BYTES = 262  # a name of 255, and a port
_SHOWN_CHARACTERS = 100
_WITH_KEYS = "or give it API keys: `vecfleet keys create`"

Header = tuple[bytes, bytes]


def fault_in(headers: Iterable[Header], *, is_local: bool) -> str:
    """Why a gateway without keys refuses this request; "" where it does not.

    ``is_local``: it listens on the loopback address, where nobody calls it by another name. On
    others the name is not looked at: a proxy may have put in its own.
    """
    hosts: list[bytes] = []
    origin: bytes | None = None
    site = b""
    for name, value in headers:
        if name == b"host":
            hosts.append(value)
        elif name == b"origin":
            origin = value
        elif name == b"sec-fetch-site":
            site = value
    if is_local:
        for host in hosts:
            if not _is_local(host):
                return (
                    "a gateway without API keys on the loopback address answers to localhost, "
                    f"127.0.0.1 and [::1] alone, not to {_shown(host)}; use these, {_WITH_KEYS}"
                )
    if origin is None or site == b"same-origin":
        return ""
    place = origin.partition(b"://")[2]
    if place and place.lower() in (host.lower() for host in hosts):
        return ""
    if is_local and _is_local(place):
        return ""  # another program of this machine, which may do everything anyway
    return (
        f"a gateway without API keys answers to no page of {_shown(origin)}; "
        f"let that site's own server ask, {_WITH_KEYS}"
    )


@lru_cache(64)
def _is_local(place: bytes) -> bool:
    """Whether ``host`` or ``host:port`` can only be this machine."""
    if not place or len(place) > _MAX_HOST_BYTES or not place.isascii():
        return False
    host = place.decode().strip().lower()
    if host.startswith("["):
        host, _, port = host[1:].partition("]")
    else:
        host, _, port = host.partition(":")
    return is_loopback(host) and (not port or port.lstrip(":").isdigit())


def _shown(value: bytes) -> str:
    return repr(value[:_SHOWN_CHARACTERS].decode("latin-1"))
