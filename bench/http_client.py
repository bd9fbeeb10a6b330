"""A light HTTP/1.1 client: it must cost next to nothing beside what it measures."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vecfleet.common.errors import EngineFailed

_END_OF_HEAD = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Answer:
    """One response and how long it took."""

    head: bytes
    body: bytes
    seconds: float

    @property
    def status(self) -> int:
        """The status code."""
        return int(self.head.split(b" ", 2)[1])

    def header(self, name: bytes) -> bytes:
        """A header's value, by its name in small letters; empty where there is none."""
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.lower() == name:
                return value.strip()
        return b""


class Connection(asyncio.Protocol):
    """One connection that is kept open; one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._received = bytearray()
        self._head = b""
        self._missing = -1  # bytes of the body; -1 while the head is read
        self._answer: asyncio.Future[bytes] | None = None

    @classmethod
    async def open(cls, address: tuple[str, int]) -> Connection:
        """Connect to a host and port."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, *address)
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio's hook."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        """Asyncio's hook."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(EngineFailed("the gateway closed the connection"))

    def data_received(self, data: bytes) -> None:
        """Asyncio's hook."""
        self._received += data
        if self._missing < 0:
            end = self._received.find(_END_OF_HEAD)
            if end < 0:
                return
            self._head = bytes(self._received[:end])
            del self._received[: end + len(_END_OF_HEAD)]
            self._missing = int(Answer(self._head, b"", 0.0).header(b"content-length"))
        if len(self._received) >= self._missing and self._answer is not None:
            body, self._received, self._missing = bytes(self._received), bytearray(), -1
            self._answer.set_result(body)

    async def send(self, request: bytes) -> Answer:
        """Send a whole request; raises ``EngineFailed`` for every status but 200."""
        answer = await self.ask(request)
        if answer.status != 200:
            raise EngineFailed(f"the gateway answered {answer.head[:40]!r}: {answer.body[:300]!r}")
        return answer

    async def ask(self, request: bytes) -> Answer:
        """Send a whole request, whatever the answer's status is."""
        self._answer = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        self._transport.write(request)
        body = await self._answer
        return Answer(self._head, body, time.perf_counter() - began)

    def close(self) -> None:
        """Close the connection."""
        self._transport.abort()


def post(path: str, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> bytes:
    """A whole POST request."""
    data = json.dumps(body).encode()
    more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"{more}content-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def embeddings_request(texts: Sequence[str], headers: Mapping[str, str] | None = None) -> bytes:
    """A request for the vectors of ``texts``, as base64."""
    body = {"input": list(texts), "encoding_format": "base64"}
    return post("/v1/embeddings", body, headers)


async def send_all(address: tuple[str, int], requests: Sequence[bytes], at_once: int) -> float:
    """Send every request, ``at_once`` at a time; returns the seconds it took."""
    connections = [await Connection.open(address) for _ in range(at_once)]
    left = iter(requests)

    async def drive(connection: Connection) -> None:
        for request in left:
            await connection.send(request)

    try:
        began = time.perf_counter()
        await asyncio.gather(*map(drive, connections))
        return time.perf_counter() - began
    finally:
        for connection in connections:
            connection.close()


async def send_for(
    address: tuple[str, int], requests: Sequence[bytes], at_once: int, stop: asyncio.Event
) -> list[float]:
    """Send the requests over and over until ``stop``; returns the seconds of each answer."""
    connections = [await Connection.open(address) for _ in range(at_once)]
    took: list[float] = []
    sent = 0

    async def drive(connection: Connection) -> None:
        nonlocal sent
        while not stop.is_set():
            sent += 1
            took.append((await connection.send(requests[sent % len(requests)])).seconds)

    try:
        await asyncio.gather(*map(drive, connections))
        return took
    finally:
        for connection in connections:
            connection.close()
