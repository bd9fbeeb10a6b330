"""The jobs that carry a submission's documents and deletions, and where these go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vecfleet.common import codec, payloads
from vecfleet.common.collection import Collection
from vecfleet.common.document import Block
from vecfleet.common.queue_client import NewJob, Route


def block_job_id(submission: str, place: int) -> str:
    """The id of the job that carries a submission's block."""
    return f"{submission}-{place}"


def block_jobs(
    collection: Collection,
    blocks: Sequence[Block],
    submission: str,
    places: Sequence[int],
    *,
    truncate: bool,
) -> list[NewJob]:
    """The jobs that embed ``blocks``, which stand at ``places`` of their submission."""
    options = {
        "truncate": truncate,
        "uid": collection.uid,
        "space": collection.spec.space,
        "dimensions": collection.spec.dimension,
    }
    return [
        NewJob(
            block_job_id(submission, place),
            codec.pack_call(payloads.EMBED, {**block.to_wire(), **options}),
            block.tokens,
            place,
            len(block),
        )
        for place, block in zip(places, blocks, strict=True)
    ]


def delete_job(ids: Sequence[str], submission: str, place: int, version: int | None) -> NewJob:
    """The job that deletes documents, with their version where the caller gives it."""
    payload: dict[str, Any] = {"delete": list(ids)}
    if version is not None:
        payload["version"] = version
    return NewJob(
        block_job_id(submission, place),
        codec.pack_call(payloads.MERGE, payload),
        len(ids),
        place,
        len(ids),
    )


def block_route(
    collection: Collection, blocks: Sequence[Block], submission: str, box: str
) -> Route:
    """The way of ``blocks``; those that carry versions are given no others."""
    is_given = bool(blocks and blocks[0].versions and blocks[0].versions[0] is not None)
    return Route(
        box=box,
        submission=submission,
        merge_queue=str(collection.merge_queue),
        version_uid="" if is_given else _version_uid(collection),
    )


def delete_route(collection: Collection, submission: str, box: str) -> Route:
    """The way of deletions, which begin in the collection's merge queue."""
    return Route(box=box, submission=submission, version_uid=_version_uid(collection))


def _version_uid(collection: Collection) -> str:
    return collection.uid if collection.spec.versions == "assigned" else ""
