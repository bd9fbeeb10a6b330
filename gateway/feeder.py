"""One submission being filled: cuts blocks, waits for room in the queue, keeps the account."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from typing import Any

from vecfleet.common import codec
from vecfleet.common.collection import Collection
from vecfleet.common.document import Block, Document
from vecfleet.common.errors import Conflict, InvalidInput, QueueFull
from vecfleet.gateway.config import GatewayLimits
from vecfleet.gateway.errors import told
from vecfleet.gateway.fleet import Fleet

_RETRY_S = 0.25
_SPARE_S = 120  # longer than a call with the same key waits for room


class Feeder:
    """Feeds one submission; documents are accepted once their block is in the queue."""

    def __init__(
        self,
        fleet: Fleet,
        collection: Collection,
        submission: str,
        truncate: bool,
        limits: GatewayLimits,
        *,
        keyed: bool,
    ) -> None:
        """``keyed``: the caller gave an Idempotency-Key and may send the rest again."""
        self.submission = submission
        self.accepted = 0
        self.rejected = 0
        self._fleet = fleet
        self._collection = collection
        self._truncate = truncate
        self._limits = limits
        self._keyed = keyed
        self._opened = False
        self._content = hashlib.blake2b(digest_size=16)
        self._errors: list[dict[str, Any]] = []
        self._block = Block()
        self._blocks = 0
        self._next_line = 1  # the first line that is neither accepted nor rejected for good
        self._last_line = 0
        self._state = ""

    def reject(self, line: int, error: InvalidInput) -> None:
        """Keep why a line was refused; all are counted, and the first are kept, cut."""
        self.rejected += 1
        self._last_line = line
        if len(self._errors) < self._limits.max_kept_errors:
            field, message = told(error)
            self._errors.append(
                {"line": line, "field": field, "code": error.code, "message": message}
            )

    async def add(self, document: Document, line: int) -> None:
        """Put a document into the block; a full block is sent first."""
        if len(self._block) and not self._block.fits(document):
            await self.flush()
        self._block.add(document)
        self._last_line = line

    async def flush(self) -> None:
        """Send what has gathered."""
        if len(self._block):
            # One that has not begun is told at once: its client loses nothing by coming again.
            wait_s = self._limits.queue_full_wait_s if self._blocks else 0.0
            await self.send([self._block], wait_s)
            self._block = Block()
        self._next_line = self._last_line + 1

    async def send(self, blocks: Sequence[Block], wait_s: float) -> None:
        """Enqueue blocks, all or none; raises ``QueueFull`` when there was no room in time.

        Raises ``Conflict`` when the key was used for other documents before.
        """
        first_block = self._note_content(blocks)
        if not self._opened:
            await self._open(first_block)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                await self._fleet.enqueue_blocks(
                    self._collection,
                    blocks,
                    submission=self.submission,
                    first_place=self._blocks,
                    truncate=self._truncate,
                )
                break
            except QueueFull as error:
                pause_s = min(error.retry_after_s or _RETRY_S, 1.0)
                if time.monotonic() + pause_s > deadline:
                    raise
                await asyncio.sleep(pause_s)
        self._blocks += len(blocks)
        self.accepted += sum(len(block) for block in blocks)

    async def close(self) -> None:
        """There is no more to come; raises ``Conflict`` as ``send`` does."""
        if not self._opened:
            await self._open("")
        content = self._content.hexdigest() if self._keyed else ""
        book = self._fleet.submissions
        self._state = await book.close(
            self.submission, blocks=self._blocks, documents=self.accepted, content=content
        )
        if self._keyed and (await book.get(self.submission)).content != content:
            raise _other_documents()

    async def settle_partial(self) -> None:
        """It broke off. Without a key nobody can continue it, so it ends with what it has."""
        if not self._opened:
            return
        if not self._blocks:
            spare_s = _SPARE_S if self._keyed else 0
            await self._fleet.submissions.discard(self.submission, spare_s)
        elif not self._keyed:
            await self.close()

    async def _open(self, first_block: str) -> None:
        """Make the submission known; a key must not stand for two different submissions."""
        book = self._fleet.submissions
        self._state = await book.open(
            self.submission,
            tenant=self._collection.tenant,
            collection=self._collection.name,
            uid=self._collection.uid,
            first_block=first_block,
            once=not self._keyed,
        )
        self._opened = True
        if first_block and (await book.get(self.submission)).first_block != first_block:
            raise _other_documents()

    def _note_content(self, blocks: Sequence[Block]) -> str:
        """Digest what is sent under a key; returns the first block's digest, or ''."""
        if not self._keyed:
            return ""
        digests = [
            hashlib.blake2b(
                codec.dumps([block.to_wire(), self._truncate]), digest_size=16
            ).hexdigest()
            for block in blocks
        ]
        self._content.update("".join(digests).encode())
        return digests[0]

    def report(self) -> dict[str, Any]:
        """What happened to the documents so far."""
        report = {
            "submission_id": self.submission,
            "collection": self._collection.name,
            "state": self._state,
            "accepted": self.accepted,
            "rejected": self.rejected,
            "errors": self._errors,
        }
        return report if self._last_line == 0 else {**report, "next_line": self._next_line}


def _other_documents() -> Conflict:
    return Conflict(
        "this Idempotency-Key was used for other documents; use a new one",
        field="Idempotency-Key",
    )
