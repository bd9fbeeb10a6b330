"""Single documents: read and delete by id."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.document import check_document_id
from vecfleet.common.errors import InvalidInput, QueueFull, UnknownDocument
from vecfleet.common.names import new_id
from vecfleet.gateway import answers
from vecfleet.gateway.context import tenant_of
from vecfleet.gateway.fleet import Fleet
from vecfleet.gateway.query import query_only, query_whole
from vecfleet.gateway.routing import Routes, json_response

_MAX_VERSION = 2**63 - 1


class Documents:
    """One document at a time; ids may hold slashes."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def routes(self) -> Routes:
        """The router."""
        path = "/collections/{collection}/documents/{document:path}"
        routes = Routes("documents")
        routes.add(
            "GET",
            path,
            self.read,
            says="One document",
            scopes=("search",),
            answer=answers.DOCUMENT,
        )
        routes.add(
            "DELETE",
            path,
            self.delete,
            says="Delete one document",
            query={"version": {"type": "integer", "minimum": 1}},
            status=202,
            scopes=("ingest",),
            answer=answers.DOCUMENT_DELETED,
            links=answers.LINKS_OF_DELETED_DOCUMENT,
            errors=(409,),
        )
        return routes

    async def read(self, request: Request) -> Response:
        """The document as stored, with its version."""
        document_id = _id(request)
        collection = await self._fleet.collection(
            request.path_params["collection"], tenant=tenant_of(request)
        )
        (found,) = await self._fleet.documents(collection, [document_id])
        if found is None:
            raise UnknownDocument(field="id")
        answer: dict[str, Any] = {"id": found.id, "text": found.text, "version": found.version}
        if found.metadata is not None:
            answer["metadata"] = found.metadata
        return json_response(answer)

    async def delete(self, request: Request) -> Response:
        """202 with a submission: the deletion takes its turn behind what was sent before."""
        query_only(request, frozenset(("version",)))
        version = query_whole(request, "version", 1, _MAX_VERSION)
        document_id = _id(request)
        collection = await self._fleet.collection(
            request.path_params["collection"], tenant=tenant_of(request)
        )
        if (version is not None) != (collection.spec.versions == "given"):
            must = "must be left out" if version is not None else "is missing"
            raise InvalidInput(
                f"version {must}: this collection's versions are {collection.spec.versions}",
                field="version",
            )
        submission = new_id()
        book = self._fleet.submissions
        await book.open(
            submission,
            tenant=collection.tenant,
            collection=collection.name,
            uid=collection.uid,
            once=True,
        )
        try:
            await self._fleet.enqueue_delete(
                collection, [document_id], submission=submission, version=version
            )
        except QueueFull:
            await book.discard(submission)
            raise
        state = await book.close(submission, blocks=1, documents=1)
        return json_response(
            {"submission_id": submission, "collection": collection.name, "state": state}, 202
        )


def _id(request: Request) -> str:
    document_id: str = request.path_params["document"]
    check_document_id(document_id)
    return document_id
