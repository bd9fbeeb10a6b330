"""Deletes documents by their ids, through the queue of what is merged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from vecfleet.common import limits
from vecfleet.common.block_job import block_job_id
from vecfleet.common.collection import Collection
from vecfleet.common.document import check_document_id
from vecfleet.common.errors import VecfleetError
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.names import new_id


async def delete(
    fleet: FleetClient,
    target: Collection,
    ids: Sequence[str],
    version: int | None,
    timeout_s: float,
) -> None:
    """Delete documents and wait until they are gone, ``timeout_s`` at most for a block of ids.

    ``version`` where the collection's versions are given. After an error some may be gone; the
    same call again deletes the rest.
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
            except VecfleetError:
                fleet.box.forget(job_id)
                raise
            sent += 1
            await fleet.box.wait(job_id, reply, timeout_s)
    except VecfleetError:
        with suppress(VecfleetError):
            await fleet.submissions.close(name, blocks=sent, documents=sum(map(len, parts[:sent])))
        raise
    await fleet.submissions.close(name, blocks=sent, documents=len(ids))
