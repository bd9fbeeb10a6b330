"""uvicorn's HTTP protocol with what it lacks: a limit on headers, in bytes and in time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vecfleet.gateway.config import GatewayLimits


class _Outlet:
    """A transport that takes nothing once it is closed, where uvloop's would raise.

    uvicorn tells only the last of several pipelined requests that their connection has gone.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write, unless the connection is closed or closing."""
        if not self._transport.is_closing():
            self._transport.write(data)


def protocol_class(limits: GatewayLimits) -> type[asyncio.Protocol]:
    """A protocol that closes connections whose headers are endless or come too slowly.

    Where there are too many connections, a new one takes the place of the one that has been without
    a request for the longest time: who sends nothing cannot keep out who does.
    """
    without_request: dict[asyncio.Protocol, asyncio.BaseTransport] = {}  # the oldest first

    class GuardedProtocol(HttpToolsProtocol):
        _header_bytes = 0
        _in_headers = True
        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.transport = _Outlet(transport)  # type: ignore[assignment]
            self._await_headers(limits.header_timeout_s)
            if len(self.connections) >= limits.max_connections and without_request:
                oldest = next(iter(without_request))
                self.connections.discard(oldest)
                without_request.pop(oldest).close()
            without_request[self] = transport

        def connection_lost(self, exc: Exception | None) -> None:
            without_request.pop(self, None)
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._in_headers:
                if self._header_bytes == 0 and self._header_timer is None:
                    self._await_headers(limits.header_timeout_s)
                self._header_bytes += len(data)
            super().data_received(data)
            if self._in_headers and self._header_bytes > limits.max_header_bytes:
                self.send_400_response("The headers are too large.")

        def on_headers_complete(self) -> None:
            self._in_headers = False
            self._header_bytes = 0
            without_request.pop(self, None)
            self._stop_timer()
            super().on_headers_complete()

        def on_response_complete(self) -> None:
            self._in_headers = True
            if not self.pipeline and not self.transport.is_closing():
                without_request[self] = self.transport
            super().on_response_complete()

        def _await_headers(self, seconds: float) -> None:
            self._header_timer = self.loop.call_later(seconds, self._too_late)

        def _too_late(self) -> None:
            self._header_timer = None
            if self._in_headers and not self.transport.is_closing():
                self.transport.close()

        def _stop_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

    return GuardedProtocol
