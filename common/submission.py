"""Submissions: the progress of all jobs of one call or one file."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import orjson
import redis.asyncio

from vecfleet.common import codec, keys
from vecfleet.common.admission import Admission
from vecfleet.common.collection import Collection
from vecfleet.common.errors import CorruptPayload, QueueFull, UnknownSubmission, VecfleetError
from vecfleet.common.rare_log import RareLog
from vecfleet.common.redis_client import read_lua, translated

log = RareLog(logging.getLogger(__name__))

_MOST_DIGITS = 19  # of what Redis counts, with the sign
_RETRY_S = 30.0
SubmissionState = Literal["open", "closed", "done", "cancelled"]


def id_of_name(collection: Collection, name: str) -> str:
    """The submission's id that a caller's name stands for: the same over HTTP and from Python."""
    content = f"{collection.tenant}\0{collection.uid}\0{name}".encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Submission:
    """Progress as counted in documents; ``state`` is done when every block is settled."""

    id: str
    state: SubmissionState
    collection: str
    tenant: str
    documents: int | None  # known once closed
    committed: int
    failed: int
    created_ms: int
    done_ms: int | None
    errors: tuple[dict[str, Any], ...] = ()  # the first refused documents: id, code, message
    uid: str = ""  # the collection's
    first_block: str = ""  # digests of what was submitted, where the client told them: so that a
    content: str = ""  # submission's key is not used again for something else unnoticed


class Submissions:
    """Open, close, follow and cancel submissions."""

    def __init__(self, client: redis.asyncio.Redis, admission: Admission | None = None) -> None:
        """``admission``: how many submissions of a tenant Redis may hold."""
        self._redis = client
        self._most = (admission or Admission()).max_submissions
        self._script = client.register_script(read_lua(Path(__file__).parent, "submission"))

    async def open(
        self,
        submission_id: str,
        *,
        tenant: str,
        collection: str,
        uid: str,
        first_block: str = "",
        once: bool = False,
    ) -> str:
        """Make the submission known; opening it again changes nothing. Returns its state.

        ``once``: its id is not made of a name that a caller may come with again, so it need not be
        remembered for long once it is done. Raises ``QueueFull`` where the tenant has too many.
        """
        kept = ["tenant", tenant, "collection", collection, "uid", uid]
        if first_block:
            kept += ["first_block", first_block]
        if once:
            kept += ["once", "1"]
        state = await self._run(submission_id, "", self._most, *kept)
        if state == "full":
            raise QueueFull(
                f"Redis remembers {self._most} submissions of this tenant and takes no more; those "
                "that are done are forgotten after a time",
                retry_after_s=_RETRY_S,
            )
        return state

    async def close(
        self, submission_id: str, *, blocks: int, documents: int, content: str = ""
    ) -> str:
        """Tell how many blocks there are; returns "done" when all are settled already."""
        kept = ("content", content) if content else ()
        return await self._run(submission_id, str(blocks), documents, *kept)

    async def get(self, submission_id: str, *, with_errors: bool = False) -> Submission:
        """The submission as it stands; raises ``UnknownSubmission``."""
        key = keys.submission(submission_id)
        try:
            with translated():
                raw: dict[bytes, bytes] = cast(Any, await self._redis.hgetall(key))
                errors: list[bytes] = (
                    cast(Any, await self._redis.lrange(f"{key}:errors", 0, -1))
                    if with_errors
                    else []
                )
        except VecfleetError as error:
            if not _is_of_another_type(error):
                raise
            raise _unreadable(submission_id) from None
        if not raw:
            raise UnknownSubmission(f"there is no submission {submission_id}, or it has expired")
        try:
            return _submission(submission_id, raw, errors)
        except ValueError:
            raise _unreadable(submission_id) from None

    async def unfinished(self, most: int = 100) -> list[Submission]:
        """Submissions that are open or closed but not done, newest first; at most ``most``."""
        found: list[Submission] = []
        prefix = keys.submission("")
        with translated():
            async for raw in self._redis.scan_iter(f"{prefix}*", count=1000, _type="HASH"):
                try:
                    submission = await self.get(raw.decode().removeprefix(prefix))
                except UnknownSubmission:
                    continue  # it expired while we looked
                if submission.state in ("open", "closed"):
                    found.append(submission)
                if len(found) >= most:
                    break
        return sorted(found, key=lambda s: s.created_ms, reverse=True)

    async def cancel(self, submission_id: str) -> Submission:
        """Stop a submission: what no worker has claimed is dropped, what is committed stays.

        Raises ``UnknownSubmission``.
        """
        await self._run(submission_id, "cancel", 0)
        return await self.get(submission_id)

    async def discard(self, submission_id: str, spare_s: int = 0) -> None:
        """Forget a submission into which nothing was enqueued; others stay.

        ``spare_s`` is left to whoever else has just opened it by the same name.
        """
        await self._run(submission_id, "forget", spare_s)

    async def _run(self, submission_id: str, what: str, number: int, *kept: str) -> str:
        key = keys.submission(submission_id)
        names = [key, f"{key}:ok", f"{key}:bad", f"{key}:errors"]
        arguments: list[str | int] = [what, number, keys.SUBMISSION_TTL_S, *kept]
        with translated():
            state: bytes = await self._script(keys=names, args=arguments)
        return state.decode()


_STATES = frozenset(get_args(SubmissionState))


def _submission(submission_id: str, raw: dict[bytes, bytes], errors: Sequence[bytes]) -> Submission:
    """A submission's record; raises ``ValueError`` for one that our scripts did not write."""
    fields = {name.decode(): value.decode() for name, value in raw.items()}
    if fields.get("state") not in _STATES:
        raise ValueError("a submission has no such state")
    return Submission(
        id=submission_id,
        state=cast(SubmissionState, fields["state"]),
        collection=fields.get("collection", ""),
        tenant=fields.get("tenant", keys.DEFAULT_TENANT),
        documents=_count(fields["documents"]) if "documents" in fields else None,
        committed=_count(fields.get("committed_documents", "0")),
        # A document that was tried again may be in the index before its block is counted.
        failed=max(0, _count(fields.get("failed_documents", "0"))),
        created_ms=_count(fields.get("created_ms", "")),
        done_ms=_count(fields["done_ms"]) if "done_ms" in fields else None,
        errors=tuple(_told(errors)),
        uid=fields.get("uid", ""),
        first_block=fields.get("first_block", ""),
        content=fields.get("content", ""),
    )


def _count(value: str) -> int:
    """A number that Redis counted; raises ``ValueError`` for anything else."""
    if len(value) > _MOST_DIGITS:
        raise ValueError("more digits than Redis counts with")
    return int(value)


def _told(errors: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """What is told of refused documents, without what a client could not be told."""
    for raw in errors:
        try:
            entry = codec.loads(raw)
            orjson.dumps(entry)
        except (CorruptPayload, TypeError):
            log.warning("what is told of a refused document cannot be read")
            continue
        if isinstance(entry, dict):
            yield entry


def _is_of_another_type(error: VecfleetError) -> bool:
    return "WRONGTYPE" in str(error.__cause__)


def _unreadable(submission_id: str) -> UnknownSubmission:
    log.warning("the record of submission %r cannot be read", submission_id)
    return UnknownSubmission(f"the record of submission {submission_id} cannot be read")
