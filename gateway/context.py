"""What the gateway knows about one request while it runs."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from vecfleet.common.names import new_id
from vecfleet.gateway.caller import NOBODY, Caller

_SCOPE_KEY = "vecfleet"
_SAFE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")

Headers = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class RequestContext:
    """One request: its id, its clock, its body's state, and what its answer's headers tell."""

    id: str
    task: asyncio.Task[Any] | None = None  # cancelled when the client goes away
    started: float = field(default_factory=time.perf_counter)
    content_length: int | None = None
    body_open: bool = False  # there is a body that has not been read to its end
    body_encoded: bool = False  # gzip and the like
    buffered_bytes: int = 0  # held in memory for this request
    unread_bytes: int = 0  # of its answer, where that is large
    disconnected: bool = False
    status: int = 0
    error_code: str = ""
    caller: Caller = NOBODY
    key_id: str = ""  # of the API key that was sent, good or not
    watch: asyncio.TimerHandle | None = None
    watcher: asyncio.Task[None] | None = None
    headers: Headers = field(default_factory=list)

    def note_inference(self, queue_ms: float, inference_ms: float, tokens: int, cut: int) -> None:
        """Tell the client how long its job waited and ran, and how many texts were cut."""
        self.headers += [
            (b"x-queue-time", b"%.3f" % queue_ms),
            (b"x-inference-time", b"%.3f" % inference_ms),
            (b"x-compute-tokens", b"%d" % tokens),
        ]
        if cut:
            self.headers.append((b"x-truncated", b"%d" % cut))

    @property
    def elapsed_ms(self) -> float:
        """Since the request's headers were read."""
        return (time.perf_counter() - self.started) * 1000


def begin(scope: dict[str, Any]) -> RequestContext:
    """The context of a request that has just come in, kept in its scope."""
    given = b""
    length: int | None = None
    chunked = encoded = False
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given = value
        elif name == b"content-length":
            length = int(value) if value.isdigit() else None
        elif name == b"transfer-encoding":
            chunked = True
        elif name == b"content-encoding":
            encoded = value.lower() != b"identity"
    context = RequestContext(
        id=given.decode() if _SAFE_ID.fullmatch(given) else new_id(),
        task=asyncio.current_task(),
        content_length=None if chunked else length,
        body_open=chunked or bool(length),
        body_encoded=encoded,
    )
    scope[_SCOPE_KEY] = context
    return context


def context_of(request: Request) -> RequestContext:
    """The context of the request that a handler answers."""
    context: RequestContext = request.scope[_SCOPE_KEY]
    return context


def tenant_of(request: Request) -> str:
    """The tenant on whose behalf a handler acts."""
    return context_of(request).caller.tenant
