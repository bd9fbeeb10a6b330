"""Looking after blocks whose answer does not come, and noticing what else goes wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from vecfleet.common.collection import Collection
from vecfleet.common.errors import (
    JobCancelled,
    JobFailed,
    QueueFull,
    RedisUnavailable,
    Unavailable,
    UnknownCollection,
    VecfleetError,
)
from vecfleet.common.fleet_client import FleetClient
from vecfleet.producer.block_states import BlockStates, Fate
from vecfleet.producer.in_flight import InFlight, Sent
from vecfleet.producer.patience import Patience
from vecfleet.producer.sending import LOOK_AGAIN_S, Sender
from vecfleet.producer.settling import DEAD_LETTER, Settling

log = logging.getLogger(__name__)

_LOOK_S = 0.25
_IDLE_S = 5.0  # without progress, before we ask why


class Watcher:
    """An answer can be lost (Redis restarted, another run's box); what is in Redis tells."""

    def __init__(
        self,
        fleet: FleetClient,
        collection: Collection,
        *,
        in_flight: InFlight,
        states: BlockStates,
        settling: Settling,
        sender: Sender,
        patience: Patience,
        reopen: Callable[[], Awaitable[None]],
    ) -> None:
        """``reopen`` makes the submission known to a Redis that forgot it."""
        self._fleet = fleet
        self._collection = collection
        self._in_flight = in_flight
        self._states = states
        self._settling = settling
        self._sender = sender
        self._patience = patience
        self._reopen = reopen
        self._asked_at = 0.0
        self.hint = ""  # why nothing moves, as far as one can tell

    async def run(self) -> None:
        """Look until cancelled.

        Raises ``JobCancelled`` when somebody cancelled the submission, ``UnknownCollection`` when
        the collection was deleted, ``Unavailable`` when Redis, or what it knows of collections,
        was away for too long.
        """
        was_away = False
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                if was_away:
                    for sent in self._in_flight:
                        sent.look_at = 0.0  # its reply may have been lost meanwhile
                await self.look()
                await self._settling.tell_failures()
                await self.check_collection()
                await self._explain()
            except Unavailable as error:
                was_away = True
                self._patience.failed(error)
                continue
            was_away = False
            self._patience.ok()

    async def look(self) -> None:
        """Ask Redis about every block that is due."""
        now = asyncio.get_running_loop().time()
        due = [s for s in self._in_flight if not s.is_sending and s.look_at <= now]
        state, fates = await self._states.look([sent.cut.place for sent in due])
        if state == "cancelled":
            raise JobCancelled("somebody cancelled the submission; what was committed stays")
        if not state and len(self._in_flight):
            log.warning("Redis has lost the submission; sending again what it lost")
            await self._reopen()
        for sent, fate in zip(due, fates, strict=True):
            await self._act(sent, fate)

    async def _act(self, sent: Sent, fate: Fate) -> None:
        if self._in_flight.get(sent.cut.place) is not sent:
            return  # settled while we asked
        now = asyncio.get_running_loop().time()
        if fate == "committed":
            # Which of its documents were refused, only the submission's counters know.
            self._settling.is_uncertain = True
            self._settling.settle(sent, committed=sent.documents)
        elif fate == "refused":
            self._settling.fail(sent, JobFailed(DEAD_LETTER))
        elif fate == "waiting":
            sent.look_at = now + (_LOOK_S if sent.is_doubtful else LOOK_AGAIN_S)
        else:
            if sent.version and self._collection.spec.versions == "assigned":
                sent.cut.set_version(sent.version)
            try:
                await self._sender.resend(sent)
            except QueueFull:
                sent.look_at = now + 1.0

    async def check_collection(self) -> None:
        """Raise ``UnknownCollection`` when answers look as if the collection was deleted.

        An aggregator discards what comes for a deleted collection, and says zero documents.
        """
        if not self._settling.came_to_nothing:
            return
        self._settling.came_to_nothing = False
        try:
            await _check_collection(self._fleet, self._collection)
        except Unavailable:
            self._settling.came_to_nothing = True  # asked again
            raise

    async def _explain(self) -> None:
        now = asyncio.get_running_loop().time()
        idle_s = now - self._settling.progress_at
        if not len(self._in_flight) or idle_s < _IDLE_S:
            self.hint = ""
        elif now - self._asked_at > _IDLE_S:
            self._asked_at = now
            self.hint = await self._reason()

    async def _reason(self) -> str:
        model = self._collection.spec.model
        try:
            served = await self._fleet.directory.find(model, "embed")
        except RedisUnavailable:
            raise
        except VecfleetError as error:
            return error.message
        if not served.workers:
            return f"no worker serves {model} now; start one"
        return "waiting for the workers and the aggregator"


async def _check_collection(fleet: FleetClient, collection: Collection) -> None:
    """Raise ``UnknownCollection`` when the collection is not there any more."""
    gone = f"collection {collection.name!r} was deleted while documents were on their way"
    try:
        found = await fleet.collection(collection.name, tenant=collection.tenant)
    except UnknownCollection:
        raise UnknownCollection(gone, field="collection") from None
    if found.uid != collection.uid:
        raise UnknownCollection(f"{gone}, and made anew", field="collection")
