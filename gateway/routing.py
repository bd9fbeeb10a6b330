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
from vecfleet.gateway import answers
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
        needs_body: bool = True,
        line: Schema | None = None,
        query: dict[str, Schema] | None = None,
        headers: dict[str, Schema] | None = None,
        status: int = 200,
        scopes: Sequence[Scope] | None = None,
        answer: Schema | None = None,
        media: Sequence[str] = ("application/json",),
        errors: Sequence[int] = (),
        links: dict[str, Any] | None = None,
    ) -> None:
        """Serve ``method path``; ``body``, ``line`` (of NDJSON) and ``query`` are JSON schemas.

        ``scopes``: one of them is enough; where nothing is said, it takes an administrator.
        ``answer`` is the schema of what comes with ``status`` in the first of ``media``, ``errors``
        are statuses beside those that every route may give, ``links`` what the answer leads to.
        """
        extra: dict[str, Any] = {"parameters": _parameters(path, query or {}, headers or {})}
        if scopes is not None:
            extra[_SCOPES] = list(scopes)
        if body is not None:
            content = {"application/json": {"schema": body}}
            if line is not None:
                content["application/x-ndjson"] = {"schema": line}
            extra["requestBody"] = {"required": needs_body, "content": content}
        extra["responses"] = answers.responses(
            path,
            status,
            answer,
            has_body=body is not None,
            media=media,
            errors=errors,
            is_open=path in OPEN_PATHS,
        )
        if links:
            extra["responses"][str(status)]["links"] = links
        self.add_api_route(
            path,
            handler,
            methods=[method],
            summary=says,
            status_code=status,
            response_model=None,
            response_class=Response,  # else FastAPI adds a kind of its own
            operation_id=_operation_id(method, path),
            openapi_extra=extra,
        )


_PATH_SCHEMAS: dict[str, Schema] = {
    "collection": {"type": "string", "pattern": "^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}$"},
    "submission": {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,128}$"},
}


def _parameters(
    path: str, query: dict[str, Schema], headers: dict[str, Schema]
) -> list[dict[str, Any]]:
    named = [part.split("}")[0].split(":")[0] for part in path.split("{")[1:]]
    anything: Schema = {"type": "string", "minLength": 1}
    found: list[dict[str, Any]] = [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": _PATH_SCHEMAS.get(name, anything),
        }
        for name in named
    ]
    for place, given in (("query", query), ("header", headers)):
        found += [
            {"name": name, "in": place, "required": False, "schema": schema}
            for name, schema in given.items()
        ]
    return found


def _operation_id(method: str, path: str) -> str:
    """Such as ``post_collections_search``."""
    words = [part for part in path.split("/") if part and not part.startswith("{")]
    one = "one_" if path.endswith("}") else ""
    return f"{method.lower()}_{one}{'_'.join(words)}"


def describe_keys(app: FastAPI) -> None:
    """Say in the OpenAPI document how a key is sent, and which routes take none."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {})["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        document["components"].setdefault("schemas", {}).update(answers.ERRORS)
        document["security"] = [{"bearer": []}, {"x-api-key": []}]
        for path in OPEN_PATHS:
            for operation in document["paths"].get(path, {}).values():
                operation["security"] = []
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def json_response(value: Any, status: int = 200) -> Response:
    """``value`` as JSON."""
    return Response(orjson.dumps(value), status, media_type="application/json")
