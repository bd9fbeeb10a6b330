"""Submissions: the progress of all jobs of one call or one file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import redis.asyncio

from vecfleet.common import codec, keys
from vecfleet.common.collection import Collection
from vecfleet.common.errors import UnknownSubmission
from vecfleet.common.redis_client import read_lua, translated

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

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._redis = client
        self._script = client.register_script(read_lua(Path(__file__).parent, "submission"))

    async def open(
        self, submission_id: str, *, tenant: str, collection: str, uid: str, first_block: str = ""
    ) -> str:
        """Make the submission known; opening it again changes nothing. Returns its state."""
        kept = ["tenant", tenant, "collection", collection, "uid", uid]
        if first_block:
            kept += ["first_block", first_block]
        return await self._run(submission_id, "", 0, *kept)

    async def close(
        self, submission_id: str, *, blocks: int, documents: int, content: str = ""
    ) -> str:
        """Tell how many blocks there are; returns "done" when all are settled already."""
        kept = ("content", content) if content else ()
        return await self._run(submission_id, str(blocks), documents, *kept)

    async def get(self, submission_id: str, *, with_errors: bool = False) -> Submission:
        """The submission as it stands; raises ``UnknownSubmission``."""
        key = keys.submission(submission_id)
        with translated():
            raw: dict[bytes, bytes] = cast(Any, await self._redis.hgetall(key))
            errors: list[bytes] = (
                cast(Any, await self._redis.lrange(f"{key}:errors", 0, -1)) if with_errors else []
            )
        if not raw:
            raise UnknownSubmission(f"there is no submission {submission_id}, or it has expired")
        fields = {name.decode(): value.decode() for name, value in raw.items()}
        return Submission(
            id=submission_id,
            state=cast(SubmissionState, fields["state"]),
            collection=fields.get("collection", ""),
            tenant=fields.get("tenant", keys.DEFAULT_TENANT),
            documents=int(fields["documents"]) if "documents" in fields else None,
            committed=int(fields.get("committed_documents", 0)),
            # A document that was tried again may be in the index before its block is counted.
            failed=max(0, int(fields.get("failed_documents", 0))),
            created_ms=int(fields["created_ms"]),
            done_ms=int(fields["done_ms"]) if "done_ms" in fields else None,
            errors=tuple(codec.loads(entry) for entry in errors),
            uid=fields.get("uid", ""),
            first_block=fields.get("first_block", ""),
            content=fields.get("content", ""),
        )

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
        """Stop a submission: what no worker has claimed is dropped, what is committed stays."""
        submission = await self.get(submission_id)
        if submission.state in ("open", "closed"):
            with translated():
                await self._redis.hset(keys.submission(submission_id), "state", "cancelled")
        return await self.get(submission_id)

    async def discard(self, submission_id: str) -> None:
        """Forget a submission into which nothing was enqueued."""
        key = keys.submission(submission_id)
        with translated():
            await self._redis.unlink(key, f"{key}:ok", f"{key}:bad", f"{key}:errors")

    async def _run(self, submission_id: str, blocks: str, documents: int, *kept: str) -> str:
        key = keys.submission(submission_id)
        names = [key, f"{key}:ok", f"{key}:bad", f"{key}:errors"]
        arguments: list[str | int] = [blocks, documents, keys.SUBMISSION_TTL_S, *kept]
        with translated():
            state: bytes = await self._script(keys=names, args=arguments)
        return state.decode()
