"""HTTP as bytes: requests that nothing tidies up, over connections that are kept open."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import httptools

_GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass
class Answer:
    """What came back; ``status`` 0: the connection was closed without an answer."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    keeps: bool = False


class _Reader:
    """httptools' callbacks for one answer."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.done = False
        self.parts: list[bytes] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, part: bytes) -> None:
        self.parts.append(part)

    def on_message_complete(self) -> None:
        self.done = True


def request_bytes(
    method: str, target: str, headers: Mapping[str, str], body: bytes | None
) -> bytes:
    """One request; a Content-Length is set where there is a body and no header says otherwise."""
    told = {name.lower(): value for name, value in headers.items()}
    told.setdefault("host", "localhost")
    if body is not None and "transfer-encoding" not in told:
        told.setdefault("content-length", str(len(body)))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in told.items())]
    head = "\r\n".join(lines).encode("latin-1", "replace")
    return head + b"\r\n\r\n" + (body or b"")


class Connection:
    """One client's connection; opened again whenever the server has closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def exchange(self, raw: bytes, deadline_s: float = 60.0) -> Answer:
        """Send ``raw`` and read one answer; raises ``TimeoutError`` past the deadline."""
        async with asyncio.timeout(deadline_s):
            fresh = self._streams is None
            try:
                answer = await self._once(raw)
            except (ConnectionError, OSError):
                answer = Answer()
            if answer.status == 0:
                self.close()
                if not fresh:  # an idle connection may have been closed meanwhile
                    try:
                        answer = await self._once(raw)
                    except (ConnectionError, OSError):
                        answer = Answer()
            if not answer.keeps:
                self.close()
            return answer

    async def _once(self, raw: bytes) -> Answer:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(raw)
        with contextlib.suppress(ConnectionError):  # it may have answered before it closed
            await writer.drain()
        return await read_answer(reader)

    def close(self) -> None:
        """Close it at once."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """The next answer of a connection; what only says "go on" is none."""
    callbacks = _Reader()
    parser = httptools.HttpResponseParser(callbacks)
    while not callbacks.done:
        data = await reader.read(1 << 16)
        if not data:
            return Answer()
        parser.feed_data(data.removeprefix(_GO_ON))
    answer = callbacks.answer
    answer.status = parser.get_status_code()
    answer.keeps = parser.should_keep_alive()
    answer.body = b"".join(callbacks.parts)
    return answer
