"""Reading bodies: bytes are counted, pace is watched, memory is bounded, nesting is refused."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.requests import Request

from vecfleet.common.errors import (
    BodyTooLarge,
    BodyTooSlow,
    InvalidInput,
    JobCancelled,
    Unavailable,
)
from vecfleet.gateway.config import GatewayLimits
from vecfleet.gateway.context import RequestContext, context_of
from vecfleet.gateway.errors import BODY
from vecfleet.gateway.footprint import footprint
from vecfleet.gateway.shares import Shares

_WATCH_AFTER_S = 0.05


class ClientGone(JobCancelled):
    """The client closed its connection before its body was complete."""


class Bodies:
    """Reads the bodies of all requests of one gateway."""

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self._buffered = Shares(limits.max_buffered_bytes)

    async def read_object(self, request: Request, max_bytes: int | None = None) -> dict[str, Any]:
        """The JSON object in the body; raises an ``InvalidInput`` whose field is ``body``.

        From here on the request is cancelled when its client goes away: for work that nobody
        else has use for.
        """
        max_bytes = max_bytes or self._limits.max_inference_body_bytes
        value = await self.parse(request, await self.read(request, max_bytes))
        if not isinstance(value, dict):
            raise InvalidInput("the body must be a JSON object", field=BODY)
        return value

    async def read(self, request: Request, max_bytes: int, *, watch: bool = True) -> bytes:
        """The whole body; raises ``BodyTooLarge``, ``BodyTooSlow`` or ``Unavailable``.

        ``watch``: cancel the request when its client goes away, from here on.
        """
        context = context_of(request)
        if context.content_length is not None and context.content_length > max_bytes:
            raise _too_large(max_bytes)
        body: bytes | bytearray = b""
        async for part in self.stream(request):
            if context.buffered_bytes + len(part) > max_bytes:
                raise _too_large(max_bytes)
            if not self._buffered.take(context.caller.tenant, len(part)):
                raise _too_many_bodies()
            context.buffered_bytes += len(part)
            if not body:
                body = part
            else:  # kept apart, small ones would take many times their bytes
                body = bytearray(body) if isinstance(body, bytes) else body
                body += part
        if watch:
            watch_client(request, context)
        return bytes(body)

    async def parse(self, request: Request, raw: bytes) -> Any:
        """The JSON value of the body ``raw``; what it takes in memory counts as its bytes do.

        Raises an ``InvalidInput`` whose field is ``body``, or ``Unavailable``.
        """
        context = context_of(request)
        most = self._limits.max_buffered_bytes // 2
        values = await footprint(raw, most)
        if values > most:
            raise InvalidInput("the body holds too many values; split it", field=BODY)
        held = context.buffered_bytes
        self.release(context)  # and taken at once: what alone has a body can always have its values
        if not self._buffered.take(context.caller.tenant, held + values):
            raise _too_many_bodies()
        context.buffered_bytes = held + values
        return parse_json(raw)

    def release(self, context: RequestContext) -> None:
        """The request is over; what it held is free."""
        self._buffered.give(context.caller.tenant, context.buffered_bytes)
        context.buffered_bytes = 0

    async def stream(
        self, request: Request, silence_s: float | None = None
    ) -> AsyncIterator[bytes]:
        """The body's parts as they come; only time spent waiting for the client counts.

        Bytes earn time, blank ones none, and never more of it than ``silence_s``: who has sent much
        may not be silent for longer than who has sent little.
        """
        context = context_of(request)
        if context.body_encoded:
            raise InvalidInput("send the body without a content-encoding", field=BODY)
        most_s = self._limits.body_grace_s if silence_s is None else silence_s
        left_s = most_s
        while context.body_open:
            began = time.perf_counter()
            try:
                async with asyncio.timeout(max(0.0, left_s)):
                    message = await request.receive()
            except TimeoutError:
                raise BodyTooSlow from None
            left_s -= time.perf_counter() - began
            if message["type"] == "http.disconnect":
                context.disconnected = True
                context.body_open = False
                raise ClientGone
            context.body_open = message.get("more_body", False)
            part: bytes = message.get("body", b"")
            if part:
                if not part.isspace():
                    earned_s = len(part) / self._limits.min_body_bytes_per_s
                    left_s = min(most_s, left_s + earned_s)
                yield part


def watch_client(request: Request, context: RequestContext) -> None:
    """Cancel the request's task when its client goes away; the body must have been read.

    Most requests are answered before the watch begins: it costs them one timer.
    """
    loop = asyncio.get_running_loop()

    def begin() -> None:
        context.watcher = loop.create_task(_wait_for_disconnect(request, context))

    context.watch = loop.call_later(_WATCH_AFTER_S, begin)


async def _wait_for_disconnect(request: Request, context: RequestContext) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    context.disconnected = True
    if context.task is not None:
        context.task.cancel()


def parse_json(raw: bytes) -> Any:
    """The JSON value in ``raw``: valid UTF-8, no NaN, nested at most 1024 deep."""
    if not raw:
        raise InvalidInput("the body is empty; send a JSON object", field=BODY)
    collecting = gc.isenabled()
    gc.disable()  # looking for cycles, which JSON cannot have, takes several times its parsing
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"the body is not valid JSON: {error}", field=BODY) from None
    finally:
        if collecting:
            gc.enable()


def _too_large(max_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has more than {max_bytes} bytes; split it", field=BODY)


def _too_many_bodies() -> Unavailable:
    return Unavailable("the gateway holds too many large bodies", retry_after_s=1.0)
