"""Submissions: how far they are, and stopping them."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.errors import InvalidName, UnknownSubmission
from vecfleet.common.names import check_id
from vecfleet.common.submission import Submission
from vecfleet.gateway.fleet import Fleet
from vecfleet.gateway.routing import Routes, json_response


class SubmissionRoutes:
    """The progress of what was submitted, here or by a producer."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def routes(self) -> Routes:
        """The router."""
        one = "/submissions/{submission}"
        routes = Routes("submissions")
        routes.add("GET", one, self.read, says="How far a submission is")
        routes.add("DELETE", one, self.cancel, says="Cancel a submission")
        routes.add("POST", f"{one}/cancel", self.cancel, says="Cancel a submission")
        return routes

    async def read(self, request: Request) -> Response:
        """Its state, its counts and the documents that were refused on the way."""
        found = await self._fleet.submissions.get(_id(request), with_errors=True)
        return json_response(_entry(found))

    async def cancel(self, request: Request) -> Response:
        """What no worker has taken is dropped; what is committed stays."""
        return json_response(_entry(await self._fleet.submissions.cancel(_id(request))))


def _id(request: Request) -> str:
    try:
        return check_id(request.path_params["submission"], "submission")
    except InvalidName:
        raise UnknownSubmission from None  # what no submission is called


def _entry(found: Submission) -> dict[str, Any]:
    known = found.documents
    return {
        "id": found.id,
        "state": found.state,
        "collection": found.collection,
        "documents": known,
        "committed": found.committed,
        "failed": found.failed,
        "pending": None if known is None else max(0, known - found.committed - found.failed),
        "created_at": found.created_ms / 1000,
        "done_at": None if found.done_ms is None else found.done_ms / 1000,
        "errors": list(found.errors),
    }
