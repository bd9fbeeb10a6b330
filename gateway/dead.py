"""The dead letter over HTTP: look at entries, try them again, with another text too, drop them."""

from __future__ import annotations

from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.api_keys import Scope
from vecfleet.common.dead_entry import DeadEntry
from vecfleet.common.dead_walk import MAX_PAGE, DeadFilter, parse_since
from vecfleet.common.errors import InvalidInput, Unavailable
from vecfleet.gateway import answers, fields, schemas
from vecfleet.gateway.body import Bodies
from vecfleet.gateway.context import context_of, tenant_of
from vecfleet.gateway.fleet import Fleet
from vecfleet.gateway.query import query_flag, query_only, query_whole
from vecfleet.gateway.routing import Routes, json_response

_SCOPES: tuple[Scope, ...] = ("ingest", "admin")
_QUERY: dict[str, dict[str, Any]] = {
    "collection": {"type": "string"},
    "code": {"type": "string"},
    "since": {"type": "string"},
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": 50},
    "cursor": {"type": "string"},
}
_SWEEP: dict[str, dict[str, Any]] = {
    **{name: schema for name, schema in _QUERY.items() if name != "limit"},
    "limit": {**_QUERY["limit"], "default": MAX_PAGE},
    "all": {"type": "boolean", "default": False},
}
_FIELDS = frozenset(("text", "document"))
_PREVIEW_CHARACTERS = 200
_MAX_WORD = 1024


class Dead:
    """A tenant's own entries."""

    def __init__(self, fleet: Fleet, bodies: Bodies) -> None:
        self._fleet = fleet
        self._bodies = bodies

    def routes(self) -> Routes:
        """The router."""
        one = "/dead/{entry}"
        routes = Routes("dead")
        routes.add(
            "GET",
            "/dead",
            self.list,
            says="What could not be done, the newest first",
            query=_QUERY,
            scopes=_SCOPES,
            answer=answers.DEAD_PAGE,
            links=answers.LINKS_OF_DEAD_PAGE,
        )
        routes.add(
            "GET",
            one,
            self.read,
            says="One entry with its texts",
            scopes=_SCOPES,
            answer=answers.DEAD_ENTRY,
        )
        routes.add(
            "POST",
            f"{one}/retry",
            self.retry,
            says="Try an entry again, with another text at will",
            body=schemas.DEAD_RETRY,
            needs_body=False,
            status=202,
            scopes=_SCOPES,
            answer=answers.DEAD_RETRIED,
        )
        for method, path, handler, says in (
            ("POST", "/dead/retries", self.retry_many, "Try all again that the filters leave"),
            ("DELETE", "/dead", self.drop_many, "Remove all for good that the filters leave"),
        ):
            routes.add(
                method,
                path,
                handler,
                says=f"{says}, so many in one call",
                query=_SWEEP,
                scopes=_SCOPES,
                answer=answers.DEAD_SWEPT,
            )
        routes.add(
            "DELETE",
            one,
            self.drop,
            says="Remove an entry for good",
            scopes=_SCOPES,
            answer=answers.DEAD_DROPPED,
            errors=(409,),
        )
        return routes

    async def list(self, request: Request) -> Response:
        """A page; texts are cut to 200 characters."""
        query_only(request, frozenset(_QUERY))
        wanted, cursor = await self._wanted(request)
        limit = query_whole(request, "limit", 1, MAX_PAGE) or 50
        page = await self._fleet.dead_letter.page(wanted, cursor=cursor, limit=limit)
        names = await self._names(tenant_of(request))
        return json_response(
            {
                "entries": [
                    entry.to_wire(names.get(entry.uid, ""), _PREVIEW_CHARACTERS)
                    for entry in page.entries
                ],
                "cursor": page.cursor or None,
            }
        )

    async def retry_many(self, request: Request) -> Response:
        """How many are in their queues again; it ends early where a queue is full."""
        return await self._sweep(request, "retry")

    async def drop_many(self, request: Request) -> Response:
        """How many are gone, with their texts."""
        return await self._sweep(request, "drop")

    async def _sweep(self, request: Request, what: Literal["retry", "drop"]) -> Response:
        query_only(request, frozenset(_SWEEP))
        wanted, cursor = await self._wanted(request)
        is_all = query_flag(request, "all", False)
        if is_all is (wanted != DeadFilter(wanted.tenant)):
            raise InvalidInput("say with collection, code or since which, or all=true", field="all")
        limit = query_whole(request, "limit", 1, MAX_PAGE) or MAX_PAGE
        swept = await self._fleet.dead_letter.each(what, wanted, cursor=cursor, limit=limit)
        failed = [
            {"id": entry, "error": {"code": error.code, "message": error.message}}
            for entry, error in swept.failed.items()
        ]
        return json_response(
            {"done": len(swept.done), "failed": failed, "cursor": swept.cursor or None}
        )

    async def _wanted(self, request: Request) -> tuple[DeadFilter, str]:
        """Which entries of the caller's tenant, and from where on."""
        tenant = tenant_of(request)
        asked = {name: _word(request, name) for name in ("collection", "code", "since", "cursor")}
        uid = None
        if asked["collection"] is not None:
            uid = (await self._fleet.collection(asked["collection"], tenant=tenant)).uid
        since = None if asked["since"] is None else parse_since(asked["since"])
        return DeadFilter(tenant, uid, asked["code"], since), asked["cursor"] or ""

    async def read(self, request: Request) -> Response:
        """The entry with its whole texts."""
        tenant = tenant_of(request)
        entry = await self._fleet.dead_letter.get(_id(request), tenant)
        return json_response(entry.to_wire((await self._names(tenant)).get(entry.uid, "")))

    async def retry(self, request: Request) -> Response:
        """202: it is in its queue again, with the version that it had."""
        body: dict[str, Any] = {}
        if context_of(request).body_open:
            body = await self._bodies.read_object(request)
        fields.only(body, _FIELDS)
        document = body.get("document")
        if document is not None and not isinstance(document, str):
            raise InvalidInput("document must be a string", field="document")
        entry: DeadEntry = await self._fleet.dead_letter.retry(
            _id(request), tenant=tenant_of(request), text=body.get("text"), document=document
        )
        return json_response({"id": entry.id, "queued": True}, 202)

    async def drop(self, request: Request) -> Response:
        """It is gone, with its texts."""
        entry = await self._fleet.dead_letter.drop(_id(request), tenant=tenant_of(request))
        return json_response({"id": entry.id, "dropped": True})

    async def _names(self, tenant: str) -> dict[str, str]:
        """The collections' names by uid; none while nobody knows them."""
        try:
            return {c.uid: c.name for c in await self._fleet.collections(tenant=tenant)}
        except Unavailable:
            return {}


def _id(request: Request) -> str:
    return str(request.path_params["entry"])


def _word(request: Request, name: str) -> str | None:
    value = request.query_params.get(name)
    if value is not None and len(value) > _MAX_WORD:
        raise InvalidInput(f"{name} has more than {_MAX_WORD} characters", field=name)
    return value
