"""Which blocks of the input must be sent: neither those that are settled nor what is unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from vecfleet.common.collection import Collection
from vecfleet.common.errors import Conflict
from vecfleet.producer.block_states import Bits
from vecfleet.producer.cutting import CutBlock
from vecfleet.producer.in_flight import Sent
from vecfleet.producer.journal import Journal
from vecfleet.producer.settling import Settling
from vecfleet.producer.unchanged import UnchangedFilter


class Selector:
    """Holds each block against the journal, the submission's bits and the collection."""

    def __init__(
        self,
        collection: Collection,
        submission: str,
        *,
        settling: Settling,
        journal: Journal | None,
    ) -> None:
        self.bits = Bits()  # of earlier runs
        self.filter: UnchangedFilter | None = None
        self._collection = collection
        self._submission = submission
        self._settling = settling
        self._journal = journal
        self._content = hashlib.blake2b(digest_size=16)
        self._last_version = None if journal is None else journal.last_version()

    @property
    def content(self) -> str:
        """A digest of all blocks that were looked at, hex."""
        return self._content.hexdigest()

    async def select(self, blocks: Sequence[CutBlock]) -> list[Sent]:
        """What of ``blocks`` must be sent, in their order; the rest is booked."""
        chosen: dict[int, Sent] = {}
        fresh: list[CutBlock] = []
        for cut in blocks:
            self._content.update(cut.digest.encode())
            if self._is_settled(cut):
                continue
            record = self._journal.blocks.get(cut.place) if self._journal else None
            if record is not None:
                # Sent by an earlier run: the same block again, whatever has changed since.
                chosen[cut.place] = Sent(cut, earlier=record)
                self._note_sent(cut)
            else:
                fresh.append(cut)
        kept = fresh if self.filter is None or not fresh else await self.filter.changed(fresh)
        for cut, left in zip(fresh, kept, strict=True):
            if len(left):
                chosen[cut.place] = Sent(left, unchanged=len(cut) - len(left))
            else:
                self._settling.note_same(cut)
        if self._last_version is not None:
            for sent in chosen.values():
                self._keep_version(sent, self._last_version)
        return [chosen[place] for place in sorted(chosen)]

    def _is_settled(self, cut: CutBlock) -> bool:
        """Whether an earlier run settled the block; then it is booked."""
        journal = self._journal
        record = journal.blocks.get(cut.place) if journal is not None else None
        if record is not None and record.digest != cut.digest:
            raise other_input(self._submission)
        if record is not None and record.is_settled:
            self._settling.note_earlier(cut, record)
            self._note_sent(cut)
            return True
        fate = self.bits.fate(cut.place)
        if fate == "waiting":
            return False
        sent = Sent(cut, earlier=record)
        if record is not None:
            sent.documents, sent.unchanged = record.documents, record.unchanged
        self._settling.note_bit(sent, committed=fate == "committed")
        self._note_sent(cut)
        return True

    def _note_sent(self, cut: CutBlock) -> None:
        if self.filter is not None:
            self.filter.note_sent(cut)

    def _keep_version(self, sent: Sent, last: tuple[int, int]) -> None:
        """Give a block the version that it had, or would have had, in the interrupted run.

        So what others wrote since then stays the newer. Later blocks still win over earlier ones.
        """
        if self._collection.spec.versions != "assigned":
            return
        place, version = last
        known = sent.earlier.version if sent.earlier is not None else 0
        sent.version = known or max(1, version + sent.cut.place - place)
        sent.cut.set_version(sent.version)


def other_input(submission: str) -> Conflict:
    """The error of a submission that is used again for something else."""
    return Conflict(
        f"submission {submission} was begun with other documents; "
        "leave it out, or name another one: what stands in the collection already is not "
        "embedded again",
        field="submission",
    )
