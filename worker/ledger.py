"""The worker's side of the queue: claim, settle, release, rescue, heartbeat, each one Lua call.

A lease is a member of ``vf:lease:{queue}``, scored by Redis TIME; removing it is the fence. RQ's
started registry only mirrors it (see common/keys.py). RQ 2.12's layout is private to RQ: a test
runs these scripts against RQ's own handlers, so that a version that moves a key is noticed.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import redis

from vecfleet.common import codec, keys
from vecfleet.common.errors import JobCancelled, JobFailed, PoisonText
from vecfleet.common.model import ModelCard
from vecfleet.common.redis_client import read_lua, translated
from vecfleet.worker.job import (
    ClaimedJob,
    Settlement,
    decode_claim,
)
from vecfleet.worker.known_queues import AT_ONCE, KnownQueues, by_name, in_parts, lines_of, parsed
from vecfleet.worker.roster import Roster, rq_time
from vecfleet.worker.settle_call import rq_reason, settle_arguments

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_RESCUE_AT_ONCE = 1024  # leases, of all queues
KNOWN_AT_ONCE = 100  # queues in which no lease is known; each worker looks, each second
KNOWN_TEXTS = 1024  # at most so many are remembered for a model, as named or condemned
_NAMED_TTL_MS = 300_000  # longer than a hung worker takes to end
_CONDEMNED_TTL_MS = 3_600_000
MAX_CONDEMNED = 8  # texts of one job; one that still kills is buried whole
NAMED, CONDEMNED = "named", "condemned"
_IS_CONDEMNED = -2  # mark.lua's answer
_DATA = 4  # place of the data in a row of claim.lua's answer
_INFLATED_BYTES = 32 << 20  # what one claim may decompress; Redis counts them compressed
_DIED = "the job's worker died or lost its lease too often"


@dataclass(frozen=True, slots=True)
class Ask:
    """How much to claim from one queue, or from those of every tenant, by turns.

    It is as much as all that one call claims may come to, except that one job always may.
    """

    queue: keys.QueueName
    jobs: int
    tokens: int
    bytes: int = 1 << 40  # of data
    is_alone: bool = True  # nothing of the queue's lane is in flight in this worker


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a worker says of itself with each heartbeat."""

    card: ModelCard | None = None
    pools: tuple[str, ...] = ()
    status: dict[str, str | int | float] = field(default_factory=dict)
    state: str = ""  # where it is none of those that the heartbeat knows


class Ledger:
    """One worker's claims in Redis. Thread-safe, but for ``rescue``, which one thread calls."""

    def __init__(
        self,
        client: redis.Redis,
        worker: str,
        *,
        lease_s: float = keys.LEASE_TTL_S,
        dead_ttl_s: int = keys.DEAD_TTL_S,
        max_merge_bytes: int = 0,
        max_unmerged_bytes: int = 0,
    ) -> None:
        """``worker`` must be unique among the living; its name is part of every claim.

        ``dead_ttl_s``: how long the dead letter keeps what is put there. Blocks of a collection
        wait while more than ``max_merge_bytes`` wait to be merged into it, or, of those of all,
        more than ``max_unmerged_bytes`` leave; 0 for no limit.
        """
        self.worker = worker
        self._dead_ttl_s = dead_ttl_s
        self._max_unmerged = (max_merge_bytes, max_unmerged_bytes)
        self._known = KnownQueues(client, KNOWN_AT_ONCE)
        self.roster = Roster(client, worker)
        self._redis = client
        self._lease_ms = int(lease_s * 1000)
        # Claims are told apart by a prefix of this process, so that claims whose reply was lost
        # can be found again among the leases.
        self._prefix = secrets.token_hex(8)
        self._numbers = itertools.count(1)  # two lanes claim at the same time

        def script(name: str) -> Any:
            return client.register_script(read_lua(_FOLDER, "ledger", name))

        self._claim = script("claim")
        self._settle = script("settle")
        self._release = script("release")
        self._rescue = script("rescue")
        self._mark = script("mark")
        self._acquit = script("acquit")
        self._heartbeat = script("heartbeat")

    def claim(self, asks: Sequence[Ask]) -> list[ClaimedJob]:
        """``claim_or_wait`` for callers that have nothing in flight."""
        return self.claim_or_wait(asks)[0]

    def claim_or_wait(self, asks: Sequence[Ask]) -> tuple[list[ClaimedJob], bool]:
        """Take jobs from the queues of ``asks``, the first ones first.

        Also whether a suspect, a job whose worker died, waits to be claimed alone: then nothing
        more should be claimed before nothing is in flight, or it would wait for ever.
        """
        arguments: list[Any] = [
            self.worker,
            rq_time(),
            self._lease_ms,
            f"{self._prefix}-{next(self._numbers)}-",
            *self._max_unmerged,
        ]
        for ask in asks:
            arguments += (str(ask.queue), ask.jobs, ask.tokens, ask.bytes, int(ask.is_alone))
        names = [
            keys.line(ask.queue) if ask.queue.is_of_every_tenant else keys.queue_list(ask.queue)
            for ask in asks
        ]
        with translated():
            waits_for_calm, rows, dropped = self._claim(keys=names, args=arguments)
            self._fetch_large(rows)
        for name, count in zip(dropped[::2], dropped[1::2], strict=True):
            queue = ascii(name.decode(errors="replace"))
            log.warning("dropped %d entries of queue %s that are no jobs", count, queue)
        jobs, later = _decoded(rows)
        self.release(later)
        return jobs, waits_for_calm == 1

    def _fetch_large(self, rows: Sequence[list[Any]]) -> None:
        """Put in the data that the claim left out."""
        large = [row for row in rows if row[_DATA] is None]
        if not large:
            return
        pipe = self._redis.pipeline(transaction=False)
        for row in large:
            pipe.hget(keys.job(row[0].decode()), "data")
        for row, data in zip(large, pipe.execute(), strict=True):
            row[_DATA] = data or b""  # cancelled in between: the fence will refuse its outcome

    def wait(self, queues: Iterable[keys.QueueName], timeout_s: float) -> None:
        """Return when something came into one of the queues, or after ``timeout_s``."""
        with translated():
            self._redis.blpop([keys.bell(queue) for queue in queues], timeout=timeout_s)

    def settle(self, settlements: Sequence[Settlement]) -> list[bool]:
        """Carry out the outcomes; False for each job that was no longer ours."""
        arguments: list[Any] = [
            self.worker,
            rq_time(),
            keys.MAX_REPLIES,
            keys.REPLY_TTL_S,
            self._dead_ttl_s,
            keys.MAX_KEPT_ERRORS,
        ]
        for settlement in settlements:
            arguments += settle_arguments(settlement)
        with translated():
            return [done == 1 for done in self._settle(args=arguments)]

    def release(self, jobs: Iterable[ClaimedJob]) -> int:
        """Give claims back to the front of their queues; no attempt is charged."""
        arguments = [part for job in jobs for part in (job.id, job.execution, str(job.queue))]
        if not arguments:
            return 0
        with translated():
            return int(self._release(args=arguments))

    def rescue(self, queues: Sequence[keys.QueueName]) -> tuple[int, int]:
        """Queue jobs with expired leases again, bury those tried too often: how many of each.

        Redis knows in which queues of a line there are leases. But what stock tools push is to join
        the line too: so some more queues of those that RQ knows are looked at each time.
        """
        lines = lines_of(queues)
        if not queues:
            return 0, 0
        looked_at = dict.fromkeys(by_name(queues))
        if lines:
            looked_at |= dict.fromkeys(q for q in self._known.next() if q.line in lines)
        arguments: list[Any] = [
            keys.MAX_ATTEMPTS,
            rq_reason(_DIED),
            rq_time(),
            self._dead_ttl_s,
            keys.REPLY_TTL_S,
            keys.MAX_REPLIES,
            codec.dumps(JobFailed(_DIED).to_wire()),
            _RESCUE_AT_ONCE,
            MAX_CONDEMNED,
            _NAMED_TTL_MS,
            _CONDEMNED_TTL_MS,
            KNOWN_TEXTS,
            AT_ONCE,
            *map(str, looked_at),
        ]
        busy = [keys.busy(queue) for queue in lines.values()]
        with translated():
            again, buried = self._rescue(keys=busy, args=arguments)
        return again, buried

    def mark(
        self,
        job: ClaimedJob,
        place: int | Literal["*"] | None,
        urgent: Iterable[keys.QueueName] = (),
        *,
        digest: str = "",
    ) -> int:
        """Note that the engine gets the text at ``place`` of a suspect next.

        None: that it waits while others run; "*": that all texts have run, and the rest is done.

        Returns in how many of the ``urgent`` queues something waits; raises ``JobCancelled`` when
        the job is no longer ours, and ``PoisonText`` when the text of this ``digest`` (see
        common/hashing.py) was condemned in another job.
        """
        names = [keys.line(queue) for queue in urgent]
        at = "" if place is None else place
        arguments = [job.id, job.execution, str(job.queue), at, digest, _NAMED_TTL_MS]
        with translated():
            waiting = int(self._mark(keys=names, args=arguments))
        if waiting == _IS_CONDEMNED:
            raise PoisonText()
        if waiting < 0:
            raise JobCancelled(f"job {job.id} was cancelled or taken over")
        return waiting

    def acquit(self, pool: str, digests: Iterable[str]) -> None:
        """Texts that were named have run well."""
        with translated():
            self._acquit(keys=[keys.poison(pool)], args=[_NAMED_TTL_MS, *digests])

    def known_texts(self, pools: Iterable[str]) -> dict[str, dict[str, str]]:
        """For each pool, of the texts that have killed: digest -> ``NAMED`` or ``CONDEMNED``."""
        pools = list(pools)
        with translated():
            seconds, _ = cast(Any, self._redis.time())
            pipe = self._redis.pipeline(transaction=False)
            for pool in pools:
                pipe.zrangebyscore(keys.poison(pool), f"({seconds * 1000}", "+inf")
            rows = pipe.execute()
        found: dict[str, dict[str, str]] = {}
        for pool, members in zip(pools, rows, strict=True):
            kinds = (raw.decode().partition(":") for raw in members)
            found[pool] = {digest: kind for kind, _, digest in kinds if kind in (NAMED, CONDEMNED)}
        return found

    def heartbeat(self, jobs: Sequence[ClaimedJob], says: Announcement) -> set[str]:
        """Renew the leases of ``jobs``; returns the executions that should be stopped.

        They are no longer ours, or nobody waits for them.
        """
        card = says.card
        names = [
            f"rq:worker:{self.worker}",
            keys.worker(self.worker),
            "rq:workers",
            keys.MODELS,
            keys.model(card.name) if card else keys.MODELS,
            *(keys.live(pool) for pool in says.pools),
        ]
        arguments: list[Any] = [
            self.worker,
            rq_time(),
            self._lease_ms,
            keys.WORKER_TTL_S,
            keys.MODEL_TTL_S,
            card.name if card else "",
            codec.dumps(card.to_wire()) if card else b"",
            len(says.pools),
            len(says.status),
        ]
        for name, value in says.status.items():
            arguments += (name, value)
        for job in jobs:
            arguments += (job.id, job.execution, str(job.queue))
        with translated():
            return {lost.decode() for lost in self._heartbeat(keys=names, args=arguments)}

    def orphans(
        self, queues: Sequence[keys.QueueName], in_flight: Iterable[ClaimedJob]
    ) -> list[ClaimedJob]:
        """Claims of this process that it does not know of: their reply was lost on the way."""
        known = {f"{job.id}:{job.execution}" for job in in_flight}
        found = []
        with translated():
            asked = dict.fromkeys(by_name(queues))
            for queue in lines_of(queues).values():
                busy = cast(Any, self._redis.zrange(keys.busy(queue), 0, -1))
                asked |= dict.fromkeys(parsed(busy))
            for some in in_parts(asked):
                pipe = self._redis.pipeline(transaction=False)
                for queue in some:
                    pipe.zrange(keys.lease(queue), 0, -1)
                for queue, members in zip(some, pipe.execute(), strict=True):
                    for raw in members:
                        member = raw.decode()
                        job_id, _, execution = member.partition(":")
                        if execution.startswith(self._prefix) and member not in known:
                            found.append(_bare(job_id, execution, queue))
        return found


def _decoded(rows: Sequence[Sequence[Any]]) -> tuple[list[ClaimedJob], list[ClaimedJob]]:
    """The jobs of a claim, and those that must go back: there is no room to decompress them now."""
    jobs, later, room = [], [], _INFLATED_BYTES
    for row in rows:
        queue = keys.QueueName.parse(row[2].decode())
        is_compressed = codec.is_compressed(row[_DATA])
        if is_compressed and room <= 0:
            later.append(_bare(row[0].decode(), row[1].decode(), queue))
            continue
        jobs.append(decode_claim(row, queue))
        if is_compressed:
            room -= jobs[-1].size
    return jobs, later


def _bare(job_id: str, execution: str, queue: keys.QueueName) -> ClaimedJob:
    return ClaimedJob(
        id=job_id,
        execution=execution,
        queue=queue,
        function="",
        payload=None,
        tokens=0,
        claimed_us=0,
        enqueued_us=0,
        attempts=0,
    )
