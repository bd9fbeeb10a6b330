"""uvicorn's HTTP protocol with what it lacks: limits on headers and on what is left unread."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vecfleet.gateway.config import GatewayLimits

log = logging.getLogger(__name__)

_TLS_BUFFER_BYTES = 64 << 10  # as without TLS
_MAX_PIPELINED = 16  # requests of one connection that wait for those before them
_MAX_THROWN_AWAY_BYTES = 1 << 20  # of what comes behind a refusal that waits for its turn


class _Outlet:
    """A transport that takes nothing once it is closed, where uvloop's would raise.

    uvicorn tells only the last of several pipelined requests that their connection has gone. What
    has not been read ``linger_s`` after the closing is thrown away: it would be kept for ever.
    """

    def __init__(self, transport: asyncio.Transport, linger_s: float) -> None:
        self._transport = transport
        self._linger_s = linger_s
        self._end: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write, unless the connection is closed or closing."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """Close once what was written is sent, or ``linger_s`` have passed."""
        self._transport.close()
        if self._end is None and self._transport.get_write_buffer_size():
            loop = asyncio.get_running_loop()
            self._end = loop.call_later(self._linger_s, self._transport.abort)

    def closed(self) -> None:
        """There is nothing to wait for any more."""
        if self._end is not None:
            self._end.cancel()


def protocol_class(limits: GatewayLimits) -> type[asyncio.Protocol]:
    """A protocol that closes connections whose headers are endless or come too slowly.

    So it does where the client does not read: when next to nothing of what waits could be sent for
    ``unread_silence_s``.

    Where there are too many connections, a new one takes the place of the one that has been without
    a request for the longest time: who sends nothing cannot keep out who does.
    """
    without_request: dict[asyncio.Protocol, _Outlet] = {}  # the oldest first

    class GuardedProtocol(HttpToolsProtocol):
        _header_bytes = 0
        _in_headers = True
        _refusal = ""  # told once all before it is answered; what came after it is thrown away
        _thrown_away_bytes = 0
        _header_timer: asyncio.TimerHandle | None = None
        _unread_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if self.scheme == "https":
                self.transport.set_write_buffer_limits(_TLS_BUFFER_BYTES)
            self._outlet = _Outlet(self.transport, limits.unread_silence_s)
            self.transport = self._outlet  # type: ignore[assignment]
            self._await_headers(limits.header_timeout_s)
            if len(self.connections) >= limits.max_connections and without_request:
                oldest = next(iter(without_request))
                self.connections.discard(oldest)
                without_request.pop(oldest).close()
            without_request[self] = self._outlet

        def connection_lost(self, exc: Exception | None) -> None:
            without_request.pop(self, None)
            self._stop_timer()
            self._stop_waiting()
            super().connection_lost(exc)
            self._outlet.closed()

        def data_received(self, data: bytes) -> None:
            if self._refusal:
                self._throw_away(data)
                return
            if self._in_headers:
                at_work = self.cycle is not None and not self.cycle.response_complete
                if self._header_timer is None and not at_work:
                    self._await_headers(limits.header_timeout_s)
                self._header_bytes += len(data)
            super().data_received(data)
            if self._in_headers and self._header_bytes > limits.max_header_bytes:
                self.send_400_response("The headers are too large.")

        def _throw_away(self, data: bytes) -> None:
            """Left unread, it would make of the closing a reset that takes answers away."""
            self._thrown_away_bytes += len(data)
            if self._thrown_away_bytes > _MAX_THROWN_AWAY_BYTES:
                log.info("a client went on sending behind what was refused")
                self.transport.abort()

        def on_headers_complete(self) -> None:
            if len(self.pipeline) >= _MAX_PIPELINED:
                self.send_400_response("Too many requests wait on this connection.")
            if self._refusal:
                return
            super().on_headers_complete()  # it raises where the address cannot be read
            self._in_headers = False
            self._header_bytes = 0
            without_request.pop(self, None)
            self._stop_timer()

        def on_body(self, body: bytes) -> None:
            if not self._refusal:
                super().on_body(body)

        def on_message_complete(self) -> None:
            self._in_headers = True  # of the next request, which may come before the answer
            super().on_message_complete()

        def send_400_response(self, msg: str) -> None:
            """Refuse what cannot be read: in its turn, never within or instead of an answer."""
            if self._refusal:
                return
            is_bodys = not self._in_headers  # of the newest request, whose headers were good
            is_first = self.cycle is None or self.cycle.response_complete
            if is_first or (is_bodys and not self.pipeline and not self.cycle.response_started):
                super().send_400_response(msg)
                return
            if is_bodys and self.pipeline:
                self.pipeline.popleft()  # it would wait for the rest of its body
            self._refusal = msg
            self.flow.resume_reading()

        def on_response_complete(self) -> None:
            if self._refusal and not self.pipeline:
                super().send_400_response(self._refusal)
            elif not self._in_headers and not self.pipeline:
                self.transport.close()  # nobody bounds the rest of a body that is answered already
            if not self.pipeline and not self.transport.is_closing():
                without_request[self] = self._outlet
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread_timer = self.loop.call_later(limits.unread_silence_s, self._cut_off)

        def resume_writing(self) -> None:
            self._stop_waiting()
            super().resume_writing()

        def _cut_off(self) -> None:
            log.info("a client did not read its answer for %g s", limits.unread_silence_s)
            self.transport.abort()

        def _stop_waiting(self) -> None:
            if self._unread_timer is not None:
                self._unread_timer.cancel()
                self._unread_timer = None

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
