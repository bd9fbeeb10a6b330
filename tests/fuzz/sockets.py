"""Bytes at the gateway's socket: broken HTTP, heads and bodies without end, wrong lengths."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator

from fuzz.requests_run import Tally
from fuzz.wire import Answer, read_answer

TEXT = json.dumps({"input": "a text"}).encode()
CLIENTS = 16
_PATIENCE_S = 40.0  # longer than any limit of the gateway


def _post(body: bytes, *lines: bytes, target: bytes = b"/v1/embeddings") -> bytes:
    head = [b"POST " + target + b" HTTP/1.1", b"host: localhost", *lines]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def _chunked(*chunks: bytes) -> bytes:
    return _post(b"".join(chunks), b"transfer-encoding: chunked")


BROKEN: dict[str, bytes] = {
    "nothing": b"\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http 0.9": b"GET /health\r\n\r\n",
    "http 9.9": b"GET /health HTTP/9.9\r\nhost: localhost\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
    "bare line feeds": b"GET /health HTTP/1.1\nhost: localhost\n\n",
    "nul in the target": b"GET /hea\0lth HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "nul in a header": b"GET /health HTTP/1.1\r\nhost: localhost\r\na: b\0c\r\n\r\n",
    "space before the colon": b"GET /health HTTP/1.1\r\nhost : x\r\n\r\n",
    "folded header": b"GET /health HTTP/1.1\r\nhost: localhost\r\na: b\r\n c\r\n\r\n",
    "long target": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "long header": b"GET /health HTTP/1.1\r\nhost: localhost\r\na: " + b"b" * 200_000 + b"\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 30_000 + b"\r\n",
    "absolute target": b"GET http://elsewhere/health HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "connect": b"CONNECT 127.0.0.1:6379 HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "star": b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n",
    "websocket": b"GET /health HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\n"
    b"connection: upgrade\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    b"sec-websocket-version: 13\r\n\r\n",
    "length too small": _post(TEXT, b"content-length: 3"),
    "length too large": _post(TEXT, b"content-length: 1000"),
    "length huge": _post(TEXT, b"content-length: 99999999999999999999"),
    "length negative": _post(TEXT, b"content-length: -1"),
    "length no number": _post(TEXT, b"content-length: ten"),
    "length unicode": _post(TEXT, "content-length: \u0661".encode()),
    "two lengths": _post(TEXT, b"content-length: 3", b"content-length: %d" % len(TEXT)),
    "length and chunks": _post(
        b"3\r\n{}\n\r\n0\r\n\r\n", b"content-length: 3", b"transfer-encoding: chunked"
    ),
    "chunk no number": _chunked(b"zz\r\n{}\r\n0\r\n\r\n"),
    "chunk negative": _chunked(b"-2\r\n{}\r\n0\r\n\r\n"),
    "chunk huge": _chunked(b"ffffffffffffffffff\r\n{}"),
    "chunk cut": _chunked(b"ff\r\n{}"),
    "chunk extension": _chunked(b"2;" + b"a" * 100_000 + b"\r\n{}\r\n0\r\n\r\n"),
    "chunk trailers": _chunked(b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 20_000 + b"\r\n"),
    "ten thousand chunks": _chunked(*[b"1\r\n \r\n"] * 10_000, b"0\r\n\r\n"),
    "gzip encoding": _post(b"3\r\n{}\n\r\n0\r\n\r\n", b"transfer-encoding: gzip, chunked"),
    "invalid utf-8": _post(b'{"input": "\xff"}', b"content-length: 14"),
    "utf-16": _post('{"input": "a"}'.encode("utf-16"), b"content-length: 30"),
    "deep": _post(b"[" * 1_000_000, b"content-length: 1000000"),
    "deep objects": _post(b'{"a":' * 100_000, b"content-length: 500000"),
    "many containers": _post(b"[" + b"[]," * 1_500_000 + b"[]]", b"content-length: 4500004"),
    "huge number": _post(b'{"input": ' + b"9" * 900_000 + b"}", b"content-length: 900011"),
    "not a number": _post(b'{"input": NaN}', b"content-length: 14"),
    "lone surrogate": _post(b'{"input": "\\ud800"}', b"content-length: 19"),
    "nul in a text": _post(b'{"input": "a\\u0000b"}', b"content-length: 21"),
    "a key twice": _post(b'{"input": "a", "input": ["b"]}', b"content-length: 30"),
    "a line without end": _post(
        b"a" * (3 << 20),
        b"content-type: application/x-ndjson",
        b"content-length: %d" % (3 << 20),
        target=b"/collections/books/documents",
    ),
    "pipelined": b"GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n" * 200,
    "smuggled": _post(
        TEXT + b"GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n", b"content-length: 19"
    ),
}


def random_bytes(generator: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Requests with bytes changed anywhere, and cut anywhere."""
    wholes = [*BROKEN.values(), _post(TEXT, b"content-length: %d" % len(TEXT))]
    for number in range(count):
        data = bytearray(generator.choice(wholes)[:20_000])
        for _ in range(generator.choice((1, 2, 5))):
            at = generator.randrange(len(data)) if data else 0
            choice = generator.randrange(4)
            if choice == 0 and data:
                data[at] = generator.randrange(256)
            elif choice == 1:
                data[at:at] = generator.choice((b"\r\n", b"\0", b" ", b":", b"\xff", b"\r", b"\n"))
            elif choice == 2:
                del data[at : at + generator.choice((1, 10))]
            else:
                del data[max(at, 1) :]
        yield f"random {number}", bytes(data)


async def send_raw(port: int, name: str, data: bytes, tally: Tally) -> None:
    """Send ``data``, end, and see that what comes back, if anything, is no 5xx."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            answer = Answer()
            try:
                writer.write(data)
                writer.write_eof()
                answer = await read_answer(reader)
            except (ConnectionError, OSError):
                pass  # closed on us: the right answer to what is no HTTP
            finally:
                writer.close()
    except TimeoutError:
        tally.failures.append(f"socket {name}: open after {_PATIENCE_S} s; sent {data[:200]!r}")
        return
    except Exception as error:
        tally.failures.append(f"socket {name}: {error!r} in the answer; sent {data[:200]!r}")
        return
    tally.count(answer)
    if answer.status >= 500:
        tally.failures.append(
            f"socket {name}: {answer.status} {answer.body[:200]!r}; sent {data[:500]!r}"
        )


async def all_raw(port: int, generator: random.Random, count: int, tally: Tally) -> None:
    """Every broken request once and ``count`` random ones, several at a time."""
    source = iter([*BROKEN.items(), *random_bytes(generator, count)])

    async def client() -> None:
        for name, data in source:
            await send_raw(port, name, data, tally)

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(client())


async def slow_clients(port: int, count: int, tally: Tally) -> None:
    """Heads and bodies that come a byte at a time: each is cut off, or answered, in time."""

    async def trickle(data: bytes, pause_s: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        told = asyncio.create_task(read_answer(reader))
        try:
            async with asyncio.timeout(_PATIENCE_S):
                for place in range(len(data)):
                    if told.done():
                        break
                    writer.write(data[place : place + 1])
                    await writer.drain()
                    await asyncio.sleep(pause_s)
                tally.count(await told)
        except (ConnectionError, OSError):
            tally.count(Answer())
        except TimeoutError:
            tally.failures.append(f"a slow client was borne with for {_PATIENCE_S} s")
        finally:
            told.cancel()
            writer.close()

    head = b"GET /health HTTP/1.1\r\nx: " + b"a" * 200
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(_slow_body(port, tally) if number % 2 else trickle(head, 0.2))


async def _slow_body(port: int, tally: Tally) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_post(b'{"in', b"content-length: 1000"))
    try:
        async with asyncio.timeout(_PATIENCE_S):
            answer = await read_answer(reader)
        tally.count(answer)
        if answer.status not in (0, 408):
            tally.failures.append(f"a body that never comes was answered {answer.status}")
    except (ConnectionError, OSError):
        tally.count(Answer())
    except TimeoutError:
        tally.failures.append(f"a body that never comes was waited for {_PATIENCE_S} s")
    finally:
        writer.close()
