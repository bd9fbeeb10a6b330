"""uvicorn's HTTP protocol with what it lacks: limits on headers and on what is left unread."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vecfleet.gateway.config import GatewayLimits

log = logging.getLogger(__name__)

_TLS_BUFFER_BYTES = 64 << 10  # as without TLS
_MAX_PIPELINED = 16  # requests of one connection that wait for those before them
_MAX_THROWN_AWAY_BYTES = 1 << 20  # of what comes behind a refusal that waits for its turn
_FRAMING = (b"content-length", b"transfer-encoding")


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
        if self._end is None and self.unsent_bytes:
            loop = asyncio.get_running_loop()
            self._end = loop.call_later(self._linger_s, self._transport.abort)

    @property
    def unsent_bytes(self) -> int:
        """What the client has not read yet of its answers, and the system does not hold."""
        return self._transport.get_write_buffer_size()

    def give_way(self) -> None:
        """Close at once: who has not read its answers yet holds a place of another's."""
        if self.unsent_bytes:
            self._transport.abort()
        self._transport.close()

    def closed(self) -> None:
        """There is nothing to wait for any more."""
        if self._end is not None:
            self._end.cancel()


class _Intake(FlowControl):
    """Reads no more while it is ``held``, whatever a request that is at work asks for."""

    held = False

    def resume_reading(self) -> None:
        """Read on, unless held."""
        if not self.held:
            super().resume_reading()


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
        _is_upgrade = False  # the newest request asks for another protocol
        _is_primed = False  # the parser reads a head that we wrote
        _running: Any = None  # the request that is at work; ``cycle`` is the newest
        _header_timer: asyncio.TimerHandle | None = None
        _unread_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if self.scheme == "https":
                self.transport.set_write_buffer_limits(_TLS_BUFFER_BYTES)
            self.flow = self._intake = _Intake(self.transport)
            self._outlet = _Outlet(self.transport, limits.unread_silence_s)
            self.transport = self._outlet  # type: ignore[assignment]
            self._await_headers(limits.header_timeout_s)
            if len(self.connections) >= limits.max_connections and without_request:
                idle = (each for each in without_request if not without_request[each].unsent_bytes)
                oldest = next(idle, None) or next(iter(without_request))
                self.connections.discard(oldest)
                without_request.pop(oldest).give_way()
            without_request[self] = self._outlet

        def connection_lost(self, exc: Exception | None) -> None:
            without_request.pop(self, None)
            self._stop_timer()
            self._stop_waiting()
            if self._running is not None and not self._running.response_complete:
                self._running.disconnected = True  # uvicorn tells the newest alone
                self._running.message_event.set()
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
            self._header_bytes += len(data)  # what is in a body is taken off again
            self._unset_keepalive_if_required()
            self._parse(data)
            if self._header_bytes > limits.max_header_bytes:
                self.send_400_response("The headers are too large.")

        def _parse(self, data: bytes) -> None:
            """Feed the parser, past each request that asks for another protocol.

            Nobody offers one, so the request is served in this one (RFC 9110, 7.8).
            """
            while True:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    self._is_upgrade = False
                    if self._refusal:
                        return
                    data = self._head_of_body_or_end() + data[upgrade.args[0] :]
                except httptools.HttpParserError:
                    log.info("a client sent what is no HTTP request")
                    self.send_400_response("Invalid HTTP request received.")
                    return

        def _head_of_body_or_end(self) -> bytes:
            """The parser takes the body for the other protocol's: a new one reads it.

            It has to be given the answer, a head that says how long the body is; nothing where
            there is no body.
            """
            framing = [(name, value) for name, value in self.headers if name in _FRAMING]
            if not framing:
                self.on_message_complete()
                return b""
            self._is_primed = True
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            lines = (b"%s: %s\r\n" % header for header in framing)
            return b"POST / HTTP/1.1\r\n%s\r\n" % b"".join(lines)

        def _throw_away(self, data: bytes) -> None:
            """Left unread, it would make of the closing a reset that takes answers away."""
            self._thrown_away_bytes += len(data)
            if self._thrown_away_bytes > _MAX_THROWN_AWAY_BYTES:
                log.info("a client went on sending behind what was refused")
                self.transport.abort()

        def on_message_begin(self) -> None:
            if not self._is_primed:
                super().on_message_begin()

        def on_url(self, url: bytes) -> None:
            if not self._is_primed:
                super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._in_headers:  # behind a body nobody reads them
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            if self._is_primed:
                self._is_primed = False
                return
            self._is_upgrade = self.parser.should_upgrade()
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
            self._header_bytes = 0
            if self._refusal:
                return
            super().on_body(body)
            if self.pipeline and len(self.cycle.body) > HIGH_WATER_LIMIT:
                self._intake.held = True  # nobody counts it before its turn

        def on_message_complete(self) -> None:
            if self._is_upgrade:
                return  # its body comes yet
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
            self._intake.held = False
            self.flow.resume_reading()

        def _start_asgi_task(self, cycle: Any, app: Any) -> None:
            self._running = cycle
            super()._start_asgi_task(cycle, app)

        def on_response_complete(self) -> None:
            if self._refusal and not self.pipeline:
                super().send_400_response(self._refusal)
            elif not self._in_headers and not self.pipeline:
                self.transport.close()  # nobody bounds the rest of a body that is answered already
            if not self.pipeline and not self.transport.is_closing():
                without_request[self] = self._outlet
            if len(self.pipeline) <= 1:
                self._intake.held = False  # the last one's turn has come
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
