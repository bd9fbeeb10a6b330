"""The one place that turns errors into HTTP answers, in the shape that the route's clients read.

/v1/...            OpenAI: {"error": {message, type, param, code}}
/embed, /rerank    Text Embeddings Inference: {"error", "error_type"}, with its own statuses
everything else    {"error": {code, message, field}}
"""

from __future__ import annotations

import logging
import math
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.errors import (
    HTTP_STATUS,
    EmptyText,
    InvalidInput,
    JobFailed,
    NotFound,
    QueueFull,
    Unauthorized,
    Unavailable,
    VecfleetError,
)
from vecfleet.common.logs import shown
from vecfleet.gateway.context import RequestContext, context_of

log = logging.getLogger(__name__)

BODY = "body"  # the field of errors about a body that cannot be read at all
_TEI_PATHS = frozenset(("/embed", "/rerank"))
_METHOD_NOT_ALLOWED = 405
_FIELD_CHARACTERS = 256  # both may quote the caller, who may send megabytes as a field's name
_MESSAGE_CHARACTERS = 1024


class MethodNotAllowed(InvalidInput):
    """The path does not take this method."""

    code = "method_not_allowed"
    http_status = _METHOD_NOT_ALLOWED


def answer(error: VecfleetError, path: str, context: RequestContext) -> Response:
    """The answer to a request for ``path`` that failed with ``error``."""
    context.error_code = error.code
    if str(error) != error.message:
        log.warning("%s", shown(error))  # what its client is not told
    field, message = told(error)
    status = HTTP_STATUS.get(error.code, error.http_status)
    body: dict[str, Any]
    if path.startswith("/v1/"):
        kind = _openai_kind(error, status)
        body = {"error": {"message": message, "type": kind, "param": field, "code": error.code}}
        body["error"]["request_id"] = context.id
    elif path in _TEI_PATHS:
        status, kind = _tei(error, status)
        body = {"error": message, "error_type": kind, "request_id": context.id}
    else:
        body = {"error": {"code": error.code, "message": message, "field": field}}
        body["error"]["request_id"] = context.id
    body.update(getattr(error, "extra", {}))
    return Response(orjson.dumps(body), status, _headers(error), "application/json")


def told(error: VecfleetError) -> tuple[str | None, str]:
    """An error's field and message, cut to a length that can be kept and sent."""
    field = None if error.field is None else _cut(error.field, _FIELD_CHARACTERS)
    return field, _cut(error.message, _MESSAGE_CHARACTERS)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _headers(error: VecfleetError) -> dict[str, str]:
    if isinstance(error, Unauthorized):
        return {"www-authenticate": 'Bearer realm="vecfleet"'}
    if error.retry_after_s is None and not isinstance(error, QueueFull | Unavailable):
        return {}
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s or 1)))}


def _openai_kind(error: VecfleetError, status: int) -> str:
    if isinstance(error, QueueFull):
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def _tei(error: VecfleetError, status: int) -> tuple[int, str]:
    if isinstance(error, QueueFull):
        return 429, "Overloaded"
    if isinstance(error, Unavailable):
        return 503, "Unhealthy"
    if isinstance(error, JobFailed):
        return 424, "Backend"
    if isinstance(error, EmptyText):
        return 400, "Empty"
    if isinstance(error, InvalidInput) and status == 400 and error.field != BODY:
        return 422, "Validation"
    return status, "Validation" if status < 500 else "Backend"


async def on_vecfleet_error(request: Request, error: Exception) -> Response:
    """FastAPI's hook for what handlers raise."""
    assert isinstance(error, VecfleetError)
    return answer(error, request.scope["path"], context_of(request))


async def on_http_error(request: Request, error: Exception) -> Response:
    """FastAPI's hook for what the router raises: no such path, no such method."""
    assert isinstance(error, HTTPException)
    if error.status_code == _METHOD_NOT_ALLOWED:
        mapped: VecfleetError = MethodNotAllowed()
    elif error.status_code == 404:
        mapped = NotFound("there is no such path; see /docs for those there are")
    else:
        mapped = InvalidInput(str(error.detail))
    response = answer(mapped, request.scope["path"], context_of(request))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response
