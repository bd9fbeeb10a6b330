"""What every request passes: its id, its key, its clock, its access line, its client's end.

One plain ASGI middleware: a chain of convenient ones costs more than all the rest of the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vecfleet.common.errors import Forbidden, QueueFull, Unauthorized, Unavailable, VecfleetError
from vecfleet.common.logs import request_id
from vecfleet.gateway.body import Bodies
from vecfleet.gateway.caller import NOBODY
from vecfleet.gateway.config import GatewayConfig, is_loopback
from vecfleet.gateway.context import RequestContext, begin
from vecfleet.gateway.errors import answer
from vecfleet.gateway.identity import identify
from vecfleet.gateway.keyring import Keyring
from vecfleet.gateway.metrics import HttpMetrics
from vecfleet.gateway.shares import Shares
from vecfleet.gateway.unread import LARGE_BYTES, Unread, send_in_parts

log = logging.getLogger("vecfleet.gateway.access")

CLIENT_CLOSED_REQUEST = 499  # nginx's number; only in the log and in the metrics
_LINGER_BYTES = 64 << 20
_LINGER_S = 2.0
_MAX_LINGERING = 256  # requests, all tenants together
_KEYLESS = ""  # as whom those count who showed no good key


class Door:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        bodies: Bodies,
        metrics: HttpMetrics,
        config: GatewayConfig,
        unread: Unread,
        keyring: Keyring | None = None,
    ) -> None:
        """Without a ``keyring`` everybody may do everything, as the default tenant."""
        self._app = app
        self._bodies = bodies
        self._metrics = metrics
        self._unread = unread
        self._keyring = keyring
        self._is_local = is_loopback(config.host)
        self._running = Shares(config.limits.max_connections)
        self._lingering = Shares(_MAX_LINGERING)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request from its headers to its access line."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        context = begin(scope)  # type: ignore[arg-type]
        token = request_id.set(context.id)
        try:
            out = _Answer(scope, context, receive, send, self._lingering, self._unread)
            await self._serve(scope, receive, out)
        finally:
            if context.watch is not None:
                context.watch.cancel()
            if context.watcher is not None:
                context.watcher.cancel()
            self._bodies.release(context)
            self._unread.release(context)
            self._report(scope, context)
            request_id.reset(token)

    async def _serve(self, scope: Scope, receive: Receive, send: _Answer) -> None:
        context = send.context
        try:
            context.caller = identify(
                scope["headers"], scope["path"], self._keyring, context, is_local=self._is_local
            )
            who = _who(context)
            if not self._running.take(who):
                raise _Busy("the gateway works on too many requests of yours", retry_after_s=1.0)
            try:
                await self._app(scope, receive, send)
            finally:
                self._running.give(who)
        except (Unauthorized, Forbidden, _Busy) as error:
            await answer(error, scope["path"], context)(scope, receive, send)
        except asyncio.CancelledError:
            if not context.disconnected:
                raise
            if context.task is not None:
                context.task.uncancel()
        except Exception:
            log.exception("a request failed in an unforeseen way")
            if context.status == 0:
                await answer(
                    VecfleetError("the gateway failed on this request; its log says more"),
                    scope["path"],
                    context,
                )(scope, receive, send)
        if context.disconnected:
            context.status = CLIENT_CLOSED_REQUEST

    def _report(self, scope: Scope, context: RequestContext) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        elapsed_ms = context.elapsed_ms
        self._metrics.observe(scope["method"], route, context.status, elapsed_ms / 1000)
        line: dict[str, Any] = {
            "method": scope["method"],
            "route": route,
            "status": context.status,
            "ms": round(elapsed_ms, 2),
        }
        if context.error_code:
            line["code"] = context.error_code
        if context.key_id:
            line["key"] = context.key_id
        log.info("request", extra={"fields": line})


class _Busy(QueueFull):
    """The gateway works on too many requests."""


def _who(context: RequestContext) -> str:
    return _KEYLESS if context.caller is NOBODY else context.caller.tenant


def _length(message: Message) -> int:
    """The bytes of the body that follows this start of an answer; 0 where it does not say."""
    for name, value in message.get("headers", ()):
        if name == b"content-length":
            return int(value)
    return 0


class _Answer:
    """The way out: adds the headers every answer has, and ends bodies that nobody read.

    A large answer that there is no room for becomes an error.
    """

    def __init__(
        self,
        scope: Scope,
        context: RequestContext,
        receive: Receive,
        send: Send,
        lingering: Shares,
        unread: Unread,
    ) -> None:
        self.context = context
        self._scope = scope
        self._unread = unread
        self._is_refused = False
        self._lingering = lingering
        self._receive = receive
        self._send = send

    async def __call__(self, message: Message) -> None:
        """ASGI's send."""
        context = self.context
        if self._is_refused:
            return
        if message["type"] == "http.response.start":
            try:
                self._unread.take(context, _length(message))
            except Unavailable as error:
                await answer(error, self._scope["path"], context)(self._scope, self._receive, self)
                self._is_refused = True
                return
            context.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", context.id.encode())]
            if context.headers:
                headers += context.headers
                headers.append((b"x-total-time", b"%.3f" % context.elapsed_ms))
            if context.body_open:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        elif context.body_open and not message.get("more_body", False):
            # The client still sends. Closing now would reset the connection before it has read
            # the answer, so take a little more, in a bounded way, and throw it away.
            who = _who(context)
            if self._lingering.take(who):
                try:
                    await self._send({**message, "more_body": True})
                    await self._linger()
                finally:
                    self._lingering.give(who)
                message = {"type": "http.response.body", "body": b""}
        elif len(message.get("body", b"")) > LARGE_BYTES:
            await send_in_parts(message, self._send)
            return
        await self._send(message)

    async def _linger(self) -> None:
        context = self.context
        left = _LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while context.body_open and left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    context.body_open = message.get("more_body", False)
        context.body_open = False
