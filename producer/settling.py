"""Booking what became of each block: counts, the journal, and word of refused documents."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

from vecfleet.common.errors import JobFailed, VecfleetError
from vecfleet.producer.block_states import BlockStates
from vecfleet.producer.cutting import CutBlock
from vecfleet.producer.in_flight import InFlight, Sent
from vecfleet.producer.items import Rejected
from vecfleet.producer.journal import BlockRecord, Journal
from vecfleet.producer.result import Tally

DEAD_LETTER = "the block is in the dead letter"


class Settling:
    """Settles blocks, each once, whoever brings the word first: its reply or a look into Redis."""

    def __init__(
        self,
        in_flight: InFlight,
        states: BlockStates,
        journal: Journal | None,
        on_reject: Callable[[Rejected], None],
    ) -> None:
        self.tally = Tally()
        self.dirty = asyncio.Event()  # the journal has something to sync
        self.progress_at = time.monotonic()
        self.came_to_nothing = False  # a block was committed without any of its documents
        self.is_uncertain = False  # a block was settled without word of its refused documents
        self._in_flight = in_flight
        self._states = states
        self._journal = journal
        self._on_reject = on_reject
        self._failures: list[CutBlock] = []  # blocks some of whose documents were refused
        self._errors_read = 0
        self._untold: dict[str, dict[str, Any]] = {}  # refused documents by id; Redis bounds them

    def reject(self, rejects: Iterable[Rejected]) -> None:
        """Count and pass on what never was a document."""
        for entry in rejects:
            self.tally.rejected += 1
            self._on_reject(entry)

    def on_reply(self, sent: Sent, reply: asyncio.Future[Any]) -> None:
        """The merge's answer came."""
        if reply.cancelled():
            return
        error = reply.exception()
        if error is None:
            body = reply.result()
            committed = min(int(body.get("documents", sent.documents)), sent.documents)
            self.settle(sent, committed=committed)
        elif isinstance(error, VecfleetError):
            self.fail(sent, error)

    def settle(self, sent: Sent, *, committed: int) -> None:
        """Book a committed block, of which ``committed`` documents are in the index."""
        if self._in_flight.pop(sent.cut.place) is None:
            return
        failed = sent.documents - committed
        if failed:
            self._failures.append(sent.cut)
            self.came_to_nothing |= committed == 0
        self._book(sent, committed, failed)

    def fail(self, sent: Sent, error: VecfleetError) -> None:
        """Book a block that went to the dead letter."""
        if self._in_flight.pop(sent.cut.place) is None:
            return
        self._book(sent, 0, sent.documents)
        self.tell_all(sent.cut, error)

    def tell_all(self, cut: CutBlock, error: VecfleetError) -> None:
        """Pass on that all documents of a block were refused."""
        for i in range(len(cut)):
            self._on_reject(cut.rejected(i, error.code, error.message))

    def note_sent(self, sent: Sent) -> None:
        """Write into the journal that a block's job is in Redis."""
        if self._journal is not None and not sent.is_noted:
            sent.is_noted = True
            self._journal.sent(
                sent.cut.place,
                BlockRecord(sent.cut.digest, sent.documents, sent.unchanged, sent.version),
            )

    def note_same(self, cut: CutBlock) -> None:
        """Book a block of which nothing had changed."""
        self.tally.unchanged += len(cut)
        self.progress_at = time.monotonic()
        if self._journal is not None:
            self._journal.same(cut.place, cut.digest, len(cut))
            self.dirty.set()

    def note_earlier(self, cut: CutBlock, record: BlockRecord) -> None:
        """Book a block that an earlier run settled, by its journal."""
        self.tally.committed += record.committed
        self.tally.failed += record.failed
        self.tally.unchanged += record.unchanged
        if record.failed:
            self._failures.append(cut)

    def note_bit(self, sent: Sent, *, committed: bool) -> None:
        """Book a block that an earlier run settled, by its bit in Redis."""
        self._in_flight.add(sent)
        if committed:
            self.is_uncertain = True
            self.settle(sent, committed=sent.documents)
        else:
            self.fail(sent, JobFailed(DEAD_LETTER))

    def _book(self, sent: Sent, committed: int, failed: int) -> None:
        self.tally.committed += committed
        self.tally.failed += failed
        self.tally.unchanged += sent.unchanged
        self.progress_at = time.monotonic()
        if self._journal is not None:
            self.note_sent(sent)
            self._journal.done(sent.cut.place, committed, failed)
            self.dirty.set()

    async def tell_failures(self, *, at_end: bool = False) -> None:
        """Pass on which documents of the failed blocks were refused, and why.

        Redis keeps the first thousand of a submission; of those past it only the number is known.
        """
        if not (self._failures or (at_end and self.is_uncertain)):
            return
        blocks, self._failures = self._failures, []
        for entry in await self._states.errors(self._errors_read):
            self._errors_read += 1
            if "id" in entry:
                self._untold[str(entry["id"])] = entry
        for cut in blocks:
            for i, document_id in enumerate(cut.block.ids):
                found = self._untold.pop(document_id, None)
                if found is not None:
                    self._on_reject(cut.rejected(i, str(found["code"]), str(found["message"])))
        if at_end and self.is_uncertain:
            for document_id, entry in self._untold.items():
                code, message = str(entry["code"]), str(entry["message"])
                self._on_reject(Rejected("", 0, code, message, id=document_id))
            self._untold.clear()
