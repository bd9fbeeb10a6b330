"""The blocks that were sent and are not settled: a bounded window."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from vecfleet.producer.cutting import CutBlock
from vecfleet.producer.journal import BlockRecord


@dataclass(slots=True)
class Sent:
    """A block on its way, or about to go."""

    cut: CutBlock
    unchanged: int = 0  # documents of its place that were left out
    version: int = 0  # 0 where none is known
    earlier: BlockRecord | None = None  # what an earlier run noted of it
    documents: int = 0  # that its job carries
    is_sending: bool = True  # its enqueue has not been answered
    is_doubtful: bool = False  # its answer may go to somebody else
    is_noted: bool = False  # in the journal
    look_at: float = 0.0  # when to ask Redis what became of it

    def __post_init__(self) -> None:
        self.documents = len(self.cut)


class InFlight:
    """Sent blocks by place, within a number of blocks and bytes."""

    def __init__(self, max_blocks: int, max_bytes: int) -> None:
        self._max_blocks = max_blocks
        self._max_bytes = max_bytes
        self._blocks: dict[int, Sent] = {}
        self._bytes = 0
        self._changed = asyncio.Event()
        self.documents = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Sent]:
        return iter(list(self._blocks.values()))

    def get(self, place: int) -> Sent | None:
        """The block of a place, unless it is settled."""
        return self._blocks.get(place)

    def has_room(self) -> bool:
        """Whether one more may be sent; one alone always may."""
        return not self._blocks or (
            len(self._blocks) < self._max_blocks and self._bytes < self._max_bytes
        )

    def add(self, sent: Sent) -> None:
        """A block goes out."""
        self._blocks[sent.cut.place] = sent
        self._bytes += sent.cut.block.size
        self.documents += len(sent.cut)

    def pop(self, place: int) -> Sent | None:
        """A block is settled; None where it was already."""
        sent = self._blocks.pop(place, None)
        if sent is not None:
            self._bytes -= sent.cut.block.size
            self.documents -= len(sent.cut)
            self._changed.set()
        return sent

    async def wait_for_room(self) -> None:
        """Until ``has_room``."""
        while not self.has_room():
            self._changed.clear()
            await self._changed.wait()

    async def wait_until_empty(self) -> None:
        """Until all are settled."""
        while self._blocks:
            self._changed.clear()
            await self._changed.wait()
