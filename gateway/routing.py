"""Routes whose handlers read the request themselves, with an OpenAPI entry that is still true."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.api_keys import Scope
from vecfleet.gateway.context import context_of
from vecfleet.gateway.identity import OPEN_PATHS

Handler = Callable[[Request], Awaitable[Response]]
Schema = dict[str, Any]


OPEN: tuple[Scope, ...] = ()  # a route for everybody who passed the door
_UNDECLARED: tuple[Scope, ...] = ("admin",)
_SCOPES = "x-scopes"  # OpenAPI's entry that says which scopes a route takes


class RawRoute(APIRoute):
    """A route without FastAPI's parsing: the handler takes the request and gives the response."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's hook: the handler, behind the check of the caller's scopes."""
        needed = (self.openapi_extra or {}).get(_SCOPES, _UNDECLARED)

        async def handle(request: Request) -> Response:
            context_of(request).caller.check_scope(needed)
            response: Response = await self.endpoint(request)
            return response

        return handle


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
        scopes: Sequence[Scope] | None = None,
    ) -> None:
        """Serve ``method path``; ``body``, ``line`` (of NDJSON) and ``query`` are JSON schemas.

        ``scopes``: one of them is enough; where nothing is said, it takes an administrator.
        """
        extra: dict[str, Any] = {"parameters": _parameters(path, query or {})}
        if scopes is not None:
            extra[_SCOPES] = list(scopes)
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


def describe_keys(app: FastAPI) -> None:
    """Say in the OpenAPI document how a key is sent, and which routes take none."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {})["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        document["security"] = [{"bearer": []}, {"x-api-key": []}]
        for path in OPEN_PATHS:
            for operation in document["paths"].get(path, {}).values():
                operation["security"] = []
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def json_response(value: Any, status: int = 200) -> Response:
    """``value`` as JSON."""
    return Response(orjson.dumps(value), status, media_type="application/json")
