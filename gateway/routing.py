"""Routes whose handlers read the request themselves, with an OpenAPI entry that is still true."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import orjson
from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

Handler = Callable[[Request], Awaitable[Response]]
Schema = dict[str, Any]


class RawRoute(APIRoute):
    """A route without FastAPI's parsing: the handler takes the request and gives the response."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's hook."""
        return self.endpoint


class Routes(APIRouter):
    """A router to which handlers are added with what OpenAPI shall say of them."""

    def __init__(self, tag: str) -> None:
        super().__init__(route_class=RawRoute, tags=[tag])

    def add(
        self,
        method: str,
        path: str,
        handler: Handler,
        *,
        says: str,
        body: Schema | None = None,
        line: Schema | None = None,
        query: dict[str, Schema] | None = None,
        status: int = 200,
    ) -> None:
        """Serve ``method path``; ``body``, ``line`` (of NDJSON) and ``query`` are JSON schemas."""
        extra: dict[str, Any] = {"parameters": _parameters(path, query or {})}
        if body is not None:
            content = {"application/json": {"schema": body}}
            if line is not None:
                content["application/x-ndjson"] = {"schema": line}
            extra["requestBody"] = {"required": True, "content": content}
        self.add_api_route(
            path,
            handler,
            methods=[method],
            summary=says,
            status_code=status,
            response_model=None,
            openapi_extra=extra,
        )


def _parameters(path: str, query: dict[str, Schema]) -> list[dict[str, Any]]:
    named = [part.split("}")[0].split(":")[0] for part in path.split("{")[1:]]
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in named
    ] + [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in query.items()
    ]


def json_response(value: Any, status: int = 200) -> Response:
    """``value`` as JSON."""
    return Response(orjson.dumps(value), status, media_type="application/json")
