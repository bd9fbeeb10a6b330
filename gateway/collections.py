"""Collections: create, list, describe, delete."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.api_keys import Scope
from vecfleet.common.collection import Collection
from vecfleet.common.errors import InvalidInput
from vecfleet.common.names import check_name
from vecfleet.gateway import answers, fields, schemas
from vecfleet.gateway.body import Bodies
from vecfleet.gateway.context import context_of, tenant_of
from vecfleet.gateway.fleet import Fleet
from vecfleet.gateway.routing import Routes, json_response
from vecfleet.gateway.texts import MAX_DIMENSIONS

_FIELDS = frozenset(("model", "policy", "recall_target", "versions", "dimensions"))


class Collections:
    """The catalogue, as clients see it."""

    def __init__(self, fleet: Fleet, bodies: Bodies) -> None:
        self._fleet = fleet
        self._bodies = bodies

    def routes(self) -> Routes:
        """The router."""
        one = "/collections/{collection}"
        routes = Routes("collections")
        readers: tuple[Scope, ...] = ("search", "ingest", "admin")
        routes.add(
            "GET",
            "/collections",
            self.list,
            says="All collections",
            scopes=readers,
            answer=answers.COLLECTIONS,
            links=answers.LINKS_OF_COLLECTIONS,
        )
        routes.add(
            "PUT",
            one,
            self.create,
            says="Create a collection",
            body=schemas.COLLECTION,
            needs_body=False,
            status=201,
            scopes=("admin",),
            answer=answers.COLLECTION,
            links=answers.LINKS_OF_COLLECTION,
        )
        routes.add(
            "GET",
            one,
            self.read,
            says="A collection and what it holds",
            scopes=readers,
            answer=answers.COLLECTION_WITH_STATS,
        )
        routes.add(
            "DELETE",
            one,
            self.delete,
            says="Delete a collection and its documents",
            scopes=("admin",),
            answer=answers.COLLECTION_DELETED,
            links=answers.LINKS_OF_DELETED_COLLECTION,
        )
        return routes

    async def list(self, request: Request) -> Response:
        """The records, by name."""
        found = await self._fleet.collections(tenant=tenant_of(request))
        return json_response({"collections": [record(collection) for collection in found]})

    async def create(self, request: Request) -> Response:
        """The record; the same request again gets the same one, another gets a 409."""
        name = check_name(request.path_params["collection"])
        body: dict[str, Any] = {}
        if context_of(request).body_open:
            body = await self._bodies.read_object(request)
        fields.only(body, _FIELDS)
        recall = fields.number(body, "recall_target", 0.98, 0.5, 1.0)
        if recall is None:
            raise InvalidInput("recall_target must be a number", field="recall_target")
        created = await self._fleet.create_collection(
            name,
            model=fields.word(body, "model"),
            policy=fields.word(body, "policy", "auto") or "",
            recall_target=recall,
            versions=fields.word(body, "versions", "assigned") or "",
            dimensions=fields.whole(body, "dimensions", None, 1, MAX_DIMENSIONS),
            tenant=tenant_of(request),
        )
        return json_response(record(created), 201)

    async def read(self, request: Request) -> Response:
        """The record with the search process's counts."""
        collection = await self._fleet.collection(
            request.path_params["collection"], tenant=tenant_of(request)
        )
        stats = await self._fleet.collection_stats(collection)
        return json_response({**record(collection), "stats": stats})

    async def delete(self, request: Request) -> Response:
        """Its name is free at once; documents on their way to it are thrown away."""
        name = check_name(request.path_params["collection"])
        uid = await self._fleet.delete_collection(name, tenant=tenant_of(request))
        return json_response({"name": name, "uid": uid, "deleted": True})


def record(collection: Collection) -> dict[str, Any]:
    """A collection as clients see it."""
    spec = collection.spec
    return {
        "name": collection.name,
        "uid": collection.uid,
        "model": spec.model,
        "space": spec.space,
        "dimension": spec.dimension,
        "policy": spec.policy,
        "recall_target": spec.recall_target,
        "versions": spec.versions,
        "created_at": collection.created_s,
    }
