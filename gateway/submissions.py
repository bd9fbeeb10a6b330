"""Submissions: how far they are, and stopping them."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.api_keys import Scope
from vecfleet.common.errors import InvalidName, UnknownSubmission
from vecfleet.common.names import check_id
from vecfleet.common.submission import Submission
from vecfleet.gateway import answers
from vecfleet.gateway.context import tenant_of
from vecfleet.gateway.fleet import Fleet
from vecfleet.gateway.routing import Routes, json_response

_SCOPES: tuple[Scope, ...] = ("ingest",)


class SubmissionRoutes:
    """The progress of what was submitted, here or by a producer."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def routes(self) -> Routes:
        """The router."""
        one = "/submissions/{submission}"
        routes = Routes("submissions")
        routes.add(
            "GET",
            one,
            self.read,
            says="How far a submission is",
            scopes=_SCOPES,
            answer=answers.SUBMISSION,
        )
        routes.add(
            "DELETE",
            one,
            self.cancel,
            says="Cancel a submission",
            scopes=_SCOPES,
            answer=answers.SUBMISSION,
        )
        routes.add(
            "POST",
            f"{one}/cancel",
            self.cancel,
            says="Cancel a submission",
            scopes=_SCOPES,
            answer=answers.SUBMISSION,
        )
        return routes

    async def read(self, request: Request) -> Response:
        """Its state, its counts and the documents that were refused on the way."""
        return json_response(_entry(await self._own(request, with_errors=True)))

    async def cancel(self, request: Request) -> Response:
        """What no worker has taken is dropped; what is committed stays."""
        found = await self._own(request)
        return json_response(_entry(await self._fleet.submissions.cancel(found.id)))

    async def _own(self, request: Request, *, with_errors: bool = False) -> Submission:
        """The caller's submission; another tenant's is as unknown as one that never was."""
        submission_id = _id(request)
        unknown = f"there is no submission {submission_id}, or it has expired"
        try:
            found = await self._fleet.submissions.get(submission_id, with_errors=with_errors)
        except UnknownSubmission:
            raise UnknownSubmission(unknown) from None
        if found.tenant != tenant_of(request):
            raise UnknownSubmission(unknown)
        return found


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
