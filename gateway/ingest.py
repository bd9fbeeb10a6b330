"""POST /collections/{name}/documents: documents on their way into a collection."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.collection import Collection
from vecfleet.common.document import Document, check_version, cut_blocks, parse_document
from vecfleet.common.errors import (
    InvalidInput,
    QueueFull,
    TextTooLong,
    TooManyItems,
    UnknownSubmission,
    VecfleetError,
)
from vecfleet.common.logs import fields as log_fields
from vecfleet.common.names import new_id
from vecfleet.common.submission import id_of_name
from vecfleet.gateway import answers, schemas
from vecfleet.gateway.body import Bodies, ClientGone, parse_json
from vecfleet.gateway.config import GatewayConfig, GatewayLimits
from vecfleet.gateway.context import context_of, tenant_of
from vecfleet.gateway.errors import BODY
from vecfleet.gateway.feeder import Feeder
from vecfleet.gateway.fleet import Fleet
from vecfleet.gateway.lines import Line, LineCutter
from vecfleet.gateway.metrics import HttpMetrics
from vecfleet.gateway.query import query_flag, query_only
from vecfleet.gateway.routing import Routes, json_response
from vecfleet.gateway.shares import Shares
from vecfleet.gateway.turns import Turns

log = logging.getLogger(__name__)

_NDJSON = ("application/x-ndjson", "application/ndjson", "application/jsonl")
_MAX_KEY_LENGTH = 256
_SMALL_BYTES = 64 << 10
_WRAPPED = frozenset(("documents",))


class Ingest:
    """Takes documents in and answers before they are embedded."""

    def __init__(
        self, fleet: Fleet, bodies: Bodies, config: GatewayConfig, metrics: HttpMetrics
    ) -> None:
        self._fleet = fleet
        self._bodies = bodies
        self._limits: GatewayLimits = config.limits
        self._max_body_bytes = config.max_body_bytes
        self._metrics = metrics
        self._streams = Shares(config.limits.max_streams)

    def routes(self) -> Routes:
        """The router."""
        routes = Routes("documents")
        routes.add(
            "POST",
            "/collections/{collection}/documents",
            self.submit,
            says="Put documents into a collection: JSON, or NDJSON as a stream",
            body=schemas.DOCUMENTS,
            line=schemas.DOCUMENT,
            query={"truncate": {"type": "boolean", "default": True}},
            headers={"Idempotency-Key": {"type": "string", "pattern": "^[!-~]{1,256}$"}},
            status=202,
            scopes=("ingest",),
            answer=answers.INGESTED,
            links=answers.LINKS_OF_INGEST,
        )
        return routes

    async def submit(self, request: Request) -> Response:
        """202 with the submission's id; a JSON body is taken whole or not at all."""
        query_only(request, frozenset(("truncate",)))
        truncate = query_flag(request, "truncate", True)
        collection = await self._fleet.collection(
            request.path_params["collection"], tenant=tenant_of(request)
        )
        key = request.headers.get("idempotency-key")
        submission = new_id() if key is None else submission_id(collection, key)
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        feeder = Feeder(
            self._fleet, collection, submission, truncate, self._limits, keyed=key is not None
        )
        is_stream = kind in _NDJSON
        await self._check_room(request, collection, is_stream, key and submission)
        take = self._take_stream if is_stream else self._take_json
        answer = await take(request, collection, feeder)
        self._metrics.submissions.inc()
        return answer

    async def _check_room(
        self, request: Request, collection: Collection, is_stream: bool, named: str | None
    ) -> None:
        """Refuse at its headers what would be refused once it was read.

        A submission that is known by its name may be there already, which takes no room. A small
        body comes with its headers, and leaving it unread would cost its client the connection.
        """
        length = context_of(request).content_length
        if length is not None and length <= _SMALL_BYTES:
            return
        try:
            await self._fleet.check_room(collection, 0 if is_stream else length or 0)
        except QueueFull:
            if named is None:
                raise
            try:
                await self._fleet.submissions.get(named)
            except UnknownSubmission:
                named = None
            if named is None:
                raise

    async def _take_json(
        self, request: Request, collection: Collection, feeder: Feeder
    ) -> Response:
        # Not watched: what is half enqueued is finished, whether or not the client still waits.
        raw = await self._bodies.read(request, self._max_body_bytes, watch=False)
        rows = _rows(await self._bodies.parse(request, raw), self._limits.max_documents)
        del raw
        documents = await _documents(rows, collection)
        try:
            await feeder.send(list(cut_blocks(documents)), wait_s=0.0)
        except VecfleetError:
            await feeder.settle_partial()
            raise
        await feeder.close()
        return self._accepted(feeder)

    async def _take_stream(
        self, request: Request, collection: Collection, feeder: Feeder
    ) -> Response:
        if not self._streams.take(collection.tenant):
            raise QueueFull("the gateway reads too many streams", retry_after_s=2.0)
        self._metrics.streams.inc()
        try:
            await self._feed(request, collection, feeder)
        except (ClientGone, asyncio.CancelledError):
            log.info("a stream broke off", extra=log_fields(accepted=feeder.accepted))
            await feeder.settle_partial()
            raise
        except VecfleetError as error:
            await feeder.settle_partial()
            error.extra = self._said(feeder)  # type: ignore[attr-defined]
            raise
        finally:
            self._streams.give(collection.tenant)
            self._metrics.streams.dec()
        return self._accepted(feeder)

    async def _feed(self, request: Request, collection: Collection, feeder: Feeder) -> None:
        cutter = LineCutter(self._limits.max_line_bytes)
        async for part in self._bodies.stream(request, self._limits.stream_grace_s):
            turns = Turns()
            for line in cutter.feed(part):
                await self._add_line(line, collection, feeder)
                await turns.give()
        for line in cutter.end():
            await self._add_line(line, collection, feeder)
        await feeder.flush()
        await feeder.close()

    async def _add_line(self, line: Line, collection: Collection, feeder: Feeder) -> None:
        try:
            document = _parse_line(line, collection, self._limits.max_line_bytes)
        except InvalidInput as error:
            feeder.reject(line.number, error)
        else:
            await feeder.add(document, line.number)

    def _accepted(self, feeder: Feeder) -> Response:
        return json_response(self._said(feeder), 202)

    def _said(self, feeder: Feeder) -> dict[str, Any]:
        self._metrics.documents.labels("accepted").inc(feeder.accepted)
        self._metrics.documents.labels("rejected").inc(feeder.rejected)
        return feeder.report()


def submission_id(collection: Collection, key: str) -> str:
    """The id that an Idempotency-Key stands for in this collection; the same key, the same id."""
    if not 0 < len(key) <= _MAX_KEY_LENGTH or not key.isascii() or not key.isprintable():
        raise InvalidInput(
            f"Idempotency-Key must be 1 to {_MAX_KEY_LENGTH} printable ASCII characters",
            field="Idempotency-Key",
        )
    return id_of_name(collection, key)


def _rows(body: Any, max_documents: int) -> list[Any]:
    if not isinstance(body, dict):
        raise InvalidInput('the body must be {"documents": [...]} or one document', field=BODY)
    if "documents" not in body:
        return [body]
    rows = body["documents"]
    if not body.keys() <= _WRAPPED:
        raise InvalidInput("documents stands alone in the body", field=min(body.keys() - _WRAPPED))
    if not isinstance(rows, list) or not rows:
        raise InvalidInput("documents must be a list that is not empty", field="documents")
    if len(rows) > max_documents:
        raise TooManyItems(
            f"documents has {len(rows)} items; at most {max_documents} are accepted in one body; "
            "send NDJSON for more",
            field="documents",
        )
    return rows


async def _documents(rows: list[Any], collection: Collection) -> list[Document]:
    """The documents of a body, whose rows are let go one after the other."""
    turns = Turns()
    documents = []
    for i, row in enumerate(rows):
        try:
            documents.append(_parse(row, collection))
        except InvalidInput as error:
            error.field = f"documents[{i}].{error.field}" if error.field else f"documents[{i}]"
            raise
        rows[i] = None
        await turns.give()
    return documents


def _parse(row: Any, collection: Collection) -> Document:
    if not isinstance(row, dict):
        raise InvalidInput("a document must be a JSON object")
    document = parse_document(row)
    check_version(document, collection.spec.versions)
    return document


def _parse_line(line: Line, collection: Collection, max_bytes: int) -> Document:
    if line.raw is None:
        raise TextTooLong(f"the line has more than {max_bytes} bytes", field="line")
    try:
        row = parse_json(line.raw)
    except InvalidInput as error:
        raise InvalidInput(error.message.replace("the body", "the line"), field="line") from None
    return _parse(row, collection)
