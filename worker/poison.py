"""The texts of which workers have died lately, as one worker knows them.

Rescue keeps them in Redis (rescue.lua). A worker reads them every two seconds, so that a call costs
nothing more as long as there are none.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from vecfleet.common.errors import PoisonText, Unavailable
from vecfleet.common.hashing import text_key
from vecfleet.common.payloads import computed_together
from vecfleet.worker.job import ClaimedJob
from vecfleet.worker.ledger import CONDEMNED, NAMED, Ledger

_JUDGED_IN_S = 15.0  # a lease, and a look


class PoisonTexts:
    """What is remembered of texts that killed, for each pool; any thread may ask."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known: Mapping[str, Mapping[str, str]] = {}

    def refresh(self, pools: Iterable[str]) -> None:
        """Read it again; raises ``RedisUnavailable``."""
        self._known = self._ledger.known_texts(pools)

    def places(self, pool: str, payload: Mapping[str, Any], kind: str = CONDEMNED) -> list[int]:
        """Which texts of a call are known so."""
        known = self._known.get(pool)
        if not known:
            return []
        texts = computed_together(payload)
        return [at for at, parts in enumerate(texts) if known.get(text_key(*parts)) == kind]

    def named(
        self, pool: str, payload: Mapping[str, Any], but_at: Container[int] = ()
    ) -> list[str]:
        """The digests of the texts of a call that are still to be judged, without some places."""
        places = [at for at in self.places(pool, payload, NAMED) if at not in but_at]
        texts = computed_together(payload) if places else []
        return [text_key(*texts[at]) for at in places]

    def check(self, job: ClaimedJob) -> None:
        """Refuse a call that would kill again.

        Raises ``PoisonText``, or ``Unavailable`` where a text is still to be judged: its workers
        died twice, and which text they had is known of one of the two deaths. A job that nobody
        waits for is not refused for that: it could not come again.
        """
        pool, payload = job.queue.pool, job.payload
        if not self._known.get(pool):
            return
        if places := self.places(pool, payload):
            raise PoisonText(indices=places)
        if job.box and self.places(pool, payload, NAMED):
            raise Unavailable(
                "a worker has just died of a text of this call, and another one tries it alone",
                retry_after_s=_JUDGED_IN_S,
            )
