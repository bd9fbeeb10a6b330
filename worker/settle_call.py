"""An outcome as settle.lua takes it."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import Any

from vecfleet.common import codec
from vecfleet.common.errors import VecfleetError
from vecfleet.worker.job import (
    Abandoned,
    Answer,
    Commit,
    Failure,
    HandOn,
    Refused,
    Release,
    Settlement,
)


def settle_arguments(settlement: Settlement) -> tuple[Any, ...]:
    """The arguments of one job, in the order that settle.lua names."""
    job, outcome = settlement.job, settlement.outcome
    name, reply, target, payload, own_error = "answer", b"", "", b"", b""
    documents = job.documents
    refused: Sequence[Refused] = ()
    errors: list[dict[str, Any]] = []
    match outcome:
        case Answer(body) if job.is_stock:
            name, target = "finish", str(job.result_ttl_s)
            payload = base64.b64encode(codec.dumps(body))
        case Answer(body):
            reply = codec.dumps([job.id, "ok", body])
        case HandOn():
            name, target, payload = "hand_on", outcome.queue, outcome.data
            documents, refused = outcome.documents, outcome.refused
        case Commit():
            name, documents, refused = "commit", outcome.documents, outcome.refused
            reply = codec.dumps([job.id, "ok", outcome.body])
        case Release():
            name = "release"
        case Abandoned():
            name = "abandon"
        case Failure(error):
            # Whoever waits for an answer gets the error; the job is kept only where nobody did.
            waited = (bool(job.box) or job.is_left) and not job.submission
            name = "answer" if waited else "fail"
            refused = outcome.refused if waited else ()
            reply = codec.dumps([job.id, "error", error.to_wire()])
            payload, own_error = _reason_of(error), codec.dumps(error.to_wire())
            if job.submission:
                errors = [{"block": job.block, "documents": documents, **error.to_wire()}]
    errors += [entry.to_wire() for entry in refused]
    apart = [
        [r.place, r.tokens, r.data, _reason_of(r.error), codec.dumps(r.error.to_wire())]
        for r in refused
        if r.data
    ]
    return (
        job.id,
        job.execution,
        str(job.queue),
        name,
        job.box,
        reply if job.box else b"",
        target,
        payload,
        job.submission,
        job.block,
        documents,
        job.refused + len(refused),
        codec.dumps(errors) if errors else b"",
        codec.dumps_for_lua(apart) if apart else b"",
        own_error,
    )


def _reason_of(error: VecfleetError) -> bytes:
    return rq_reason(f"{error.code}: {error.message}")


def rq_reason(reason: str) -> bytes:
    """A failure's reason as RQ keeps it in its result stream."""
    return base64.b64encode(zlib.compress(reason.encode()))
