"""Leaving out documents that stand in the collection already, word for word."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from vecfleet.common.collection import Collection
from vecfleet.common.errors import VecfleetError
from vecfleet.common.fleet_client import FleetClient
from vecfleet.producer.cutting import CutBlock

log = logging.getLogger(__name__)

_ASK_TIMEOUT_S = 10.0
_STATS_TIMEOUT_S = 5.0
_SET_BITS = 1 << 27  # 16 MiB, whatever the number of documents
_PROBES = (0, 4, 8)  # places in an id's key


class SentIds:
    """Roughly which ids were sent: never forgets one, sometimes thinks of one that was not.

    A document must not be left out when an earlier one of its id is on the way: the collection
    still shows what will be overwritten. A wrong guess costs one document embedded again.
    """

    def __init__(self, bits: int = _SET_BITS) -> None:
        """``bits`` is a power of two."""
        self._mask = bits - 1
        self._bits = bytearray(bits >> 3)

    def add(self, id_key: bytes) -> None:
        """Remember an id by its key in the index."""
        for at in _PROBES:
            bit = int.from_bytes(id_key[at : at + 4], "little") & self._mask
            self._bits[bit >> 3] |= 1 << (bit & 7)

    def __contains__(self, id_key: bytes) -> bool:
        for at in _PROBES:
            bit = int.from_bytes(id_key[at : at + 4], "little") & self._mask
            if not self._bits[bit >> 3] & (1 << (bit & 7)):
                return False
        return True


class UnchangedFilter:
    """Asks the search process which documents of a block are new to the collection."""

    def __init__(self, fleet: FleetClient, collection: Collection) -> None:
        self._fleet = fleet
        self._collection = collection
        self._sent = SentIds()
        self._works = True

    async def changed(self, blocks: Sequence[CutBlock]) -> list[CutBlock]:
        """Each block with only those documents that must be sent, possibly none."""
        keys = [cut.id_keys() for cut in blocks]
        flags = await self._ask(keys, blocks) if self._works else b""
        if not any(flags):
            self._note(keys)
            return list(blocks)
        kept = []
        at = 0
        for cut, names in zip(blocks, keys, strict=True):
            places = []
            for i, name in enumerate(names):
                if not flags[at + i] or name in self._sent:
                    places.append(i)
                    self._sent.add(name)
            at += len(names)
            kept.append(cut if len(places) == len(cut) else cut.only(places))
        return kept

    def note_sent(self, cut: CutBlock) -> None:
        """Remember a block that was sent by an earlier run."""
        self._note([cut.id_keys()])

    def _note(self, keys: Sequence[Sequence[bytes]]) -> None:
        for names in keys:
            for name in names:
                self._sent.add(name)

    async def _ask(self, keys: Sequence[Sequence[bytes]], blocks: Sequence[CutBlock]) -> bytes:
        id_keys = b"".join(name for names in keys for name in names)
        contents = b"".join(cut.content_keys() for cut in blocks)
        try:
            async with asyncio.timeout(_ASK_TIMEOUT_S):
                return await self._fleet.unchanged(self._collection, id_keys, contents)
        except (VecfleetError, TimeoutError) as error:
            # It only saves work: without an answer, everything is sent.
            self._works = False
            log.warning("cannot tell unchanged documents apart, sending all: %s", error)
            return b""


async def unchanged_filter(fleet: FleetClient, collection: Collection) -> UnchangedFilter | None:
    """A filter, or None where the collection is empty or nobody can tell.

    None as well where the versions are given: a document that is left out keeps its old version,
    and a later one with a version in between would win.
    """
    if collection.spec.versions == "given":
        return None
    try:
        async with asyncio.timeout(_STATS_TIMEOUT_S):
            stats = await fleet.collection_stats(collection)
    except (VecfleetError, TimeoutError) as error:
        log.warning("cannot tell unchanged documents apart, sending all: %s", error)
        return None
    return UnchangedFilter(fleet, collection) if stats["documents"] else None
