"""Deletes documents by their ids, through the queue of what is merged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from vecfleet.common import limits
from vecfleet.common.block_job import block_job_id
from vecfleet.common.collection import Collection
from vecfleet.common.document import check_document_id
from vecfleet.common.errors import VecfleetError
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.names import new_id

_CLOSE_S = 5.0  # for telling what was sent, after an error


async def delete(
    fleet: FleetClient,
    target: Collection,
    ids: Sequence[str],
    version: int | None,
    timeout_s: float,
) -> None:
    """Delete documents and wait until they are gone, ``timeout_s`` at most for a block of ids.

    ``version`` where the collection's versions are given. After an error, and when it is cancelled,
    some may be gone, a block more than the submission tells; the same call again deletes the rest.
    """
    for document_id in ids:
        check_document_id(document_id)
    name = new_id()
    await fleet.submissions.open(
        name, tenant=target.tenant, collection=target.name, uid=target.uid, once=True
    )
    size = limits.BLOCK_DOCUMENTS
    parts = [ids[start : start + size] for start in range(0, len(ids), size)]
    sent = 0
    try:
        for part in parts:
            job_id = block_job_id(name, sent)
            reply = fleet.box.expect(job_id)
            try:
                await fleet.enqueue_delete(
                    target, part, submission=name, place=sent, version=version, answered=True
                )
                sent += 1
                await fleet.box.wait(job_id, reply, timeout_s)
            finally:
                fleet.box.forget(job_id)
        await fleet.submissions.close(name, blocks=sent, documents=len(ids))
    except (VecfleetError, asyncio.CancelledError):
        documents = sum(map(len, parts[:sent]))
        closing = asyncio.ensure_future(
            fleet.submissions.close(name, blocks=sent, documents=documents)
        )
        # Whether somebody waits for it till its end or not; a cancelled one has no exception.
        closing.add_done_callback(lambda done: done.cancelled() or done.exception())
        with suppress(VecfleetError, TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await asyncio.shield(closing)
        raise
