"""The Redis schema: every key, its type, its life, who writes it and who deletes it.

RQ's own keys (RQ 2.12's layout, kept true so that ``rq info`` and a stock ``Queue`` work):

key                        type    life                written by          deleted by
rq:queues                  set     -                   enqueue, claim      sweep
rq:queue:{queue}           list    -                   enqueue, settle     claim
rq:job:{job}               hash    until settled       enqueue, claim      settle (stock jobs: TTL)
rq:wip:{queue}             zset    member job:execution, score +inf: a mirror of the lease for
                                   readers; with a real score any stock read would fail the job
rq:execution:{job}:{exec}  hash    lease               claim, heartbeat    settle
rq:executions:{job}        zset    lease               claim, heartbeat    settle
rq:failed:{queue}          zset    dead letter's TTL   settle, rescue      retry, drop, prune
rq:finished:{queue}        zset    result TTL          settle (stock jobs) RQ's cleanup
rq:results:{job}           stream  result TTL          settle (stock jobs) -
rq:workers[:{queue}]       set     -                   start, sweep        worker's stop, sweep
rq:worker:{worker}         hash    WORKER_TTL_S        start, heartbeat    worker's stop

vecfleet's keys:

vf:lease:{queue}           zset    member job:execution, score = expiry in ms of Redis TIME.
                                   Removing the member is the fence: who removes it may settle.
                                   written by claim and heartbeat, removed by settle, release,
                                   rescue and cancel
vf:load:{queue}            hash    tokens, bytes, jobs waiting in the list; written by enqueue,
                                   claim, release and cancel; deleted when the list runs empty
vf:bell:{line}             list    at most one element: something is there to claim; written by
                                   whoever adds to a list, removed by a waiting worker
vf:line:{line}             zset    queue -> the tokens that the line will have served when its turn
                                   comes; the queues of all tenants in which something waits.
                                   written by enqueue, claim and whoever adds to a list
vf:clock:{line}            zset    the same of queues that ran empty ahead of the others; deleted
                                   when the line is empty
vf:busy:{line}             zset    queue -> when the first of its leases may be over, ms of Redis
                                   TIME: rescue looks at it then. written by claim and settle, kept
                                   by rescue, removed by it and by sweep
vf:sum:{line}              hash    the sums of vf:load over all tenants, with parked jobs; of all
                                   merge queues in vf:sum:merge; deleted when nothing waits
vf:parked:{queue}          list    jobs of embed queues that wait until this merge queue has room;
                                   counted in its vf:load as parked_tokens, _bytes and _jobs.
                                   written and emptied by claim
vf:poison:{pool}           zset    named:{digest} or condemned:{digest} of a text that killed, or
                                   cleared:{digest} of one that was named and has run well since
                                   -> its expiry, ms of Redis TIME; at most 1024. written by
                                   rescue and who computes such a text, removed by a retry too
vf:alive:{box}             string  TTL ALIVE_TTL_S: a client that reads replies lives
vf:reply:{box}             list    TTL REPLY_TTL_S: replies of settled jobs, read by that client
vf:reply_size:{box}        hash    TTL REPLY_TTL_S: bytes and number of the replies in a box that
                                   was not empty when the last one came
vf:sub:{submission}        hash    a submission's progress; SUBMISSION_TTL_S after its last change,
                                   an hour before its first block, a day or less after its end where
                                   it has no name
vf:sub:{submission}:ok     bitmap  one bit a block: committed
vf:sub:{submission}:bad    bitmap  one bit a block: in the dead letter
vf:sub:{submission}:errors list    at most MAX_KEPT_ERRORS refused documents, msgpack
vf:subs:{tenant}           zset    the tenant's submissions by when they are forgotten, Unix time;
                                   written with them, those that are over removed by the next open
vf:dead                    hash    tenant, or * for all -> bytes in the dead letter; written by
                                   whoever buries, retries or drops, and by prune
vf:dead:hours              hash    {hour}:{tenant} -> bytes that are over in that hour since 1970
vf:dead:due                zset    the fields of vf:dead:hours by hour, for prune
vf:collections:{tenant}    hash    name -> record (msgpack); a copy of the aggregator's catalogue
vf:published               string  when an aggregator last wrote such copies, Unix time; where it is
                                   missing, Redis has lost them, or there never was one
vf:sweeper                 string  a few seconds: who takes workers that are gone out of
                                   rq:workers:{queue}, for all; written by sweep
vf:version:{uid}           string  the last version a collection's enqueue assigned
vf:outstanding:{uid}       zset    job -> the version its enqueue assigned; removed when its block
                                   is committed, or by the aggregator when the job is gone: below
                                   the lowest one, no version can come any more
vf:model:{name}            string  TTL MODEL_TTL_S: the model's card (msgpack)
vf:models                  zset    model name -> last announcement, ms of Redis TIME
vf:live:{pool}             zset    TTL WORKER_TTL_S: worker -> expiry, ms of Redis TIME; written by
                                   the heartbeat
vf:writer:{home}           string  LEASE_TTL_S: the aggregator that may write this home's index
vf:worker:{worker}         hash    TTL WORKER_TTL_S: card, tokens per second, state, for status

A queue's name says what its jobs need: ``vf.{tenant}.{task}.{target}.{lane}``. The target is a
model's space for embed and rerank, ``{uid}-{partition}`` for merge, the aggregator's home for
search and catalog. Tenant ``-`` is the default tenant. A queue's line is its name without
``vf.{tenant}.``: the queues of all tenants for the same work, which are served by turns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

Lane = Literal["interactive", "bulk"]
LANES: tuple[Lane, ...] = ("interactive", "bulk")
QueueTask = Literal["embed", "rerank", "merge", "search", "catalog"]

DEFAULT_TENANT = "-"
EVERY_TENANT = "*"  # in the names of queues that a worker asks for; never a tenant's own
DEFAULT_HOME = "main"

QUEUES = "rq:queues"
MODELS = "vf:models"
PUBLISHED = "vf:published"
SWEEPER = "vf:sweeper"
DEAD_BYTES = "vf:dead"

LEASE_TTL_S = 10.0
HEARTBEAT_S = 2.0
WORKER_TTL_S = 60
ALIVE_TTL_S = 30
REPLY_TTL_S = 120
SUBMISSION_TTL_S = 7 * 24 * 3600
MODEL_TTL_S = 24 * 3600
DEAD_TTL_S = 30 * 24 * 3600
RESULT_TTL_S = 500
MAX_ATTEMPTS = 3
MAX_REPLIES = 100_000
MAX_KEPT_ERRORS = 1000


@dataclass(frozen=True, slots=True)
class QueueName:
    """A queue's name, apart and whole."""

    tenant: str
    task: QueueTask
    target: str
    lane: Lane

    def __str__(self) -> str:
        return f"vf.{self.tenant}.{self.task}.{self.target}.{self.lane}"

    @classmethod
    def parse(cls, name: str) -> QueueName:
        """The queue of this name; raises ``ValueError`` where it is none of the fleet's."""
        prefix, tenant, task, rest = name.split(".", 3)
        target, _, lane = rest.rpartition(".")
        if prefix != "vf" or task not in get_args(QueueTask) or lane not in LANES:
            raise ValueError(f"{name!r} is no queue of vecfleet")
        return cls(tenant, cast(QueueTask, task), target, lane)

    @property
    def line(self) -> str:
        """What the queues of all tenants for the same work have in common."""
        return f"{self.task}.{self.target}.{self.lane}"

    @property
    def is_of_every_tenant(self) -> bool:
        """Whether it stands for the queues of all tenants."""
        return self.tenant == EVERY_TENANT

    def of(self, tenant: str) -> QueueName:
        """The queue of ``tenant`` for the same work."""
        return replace(self, tenant=tenant)

    @property
    def pool(self) -> str:
        """What the workers that can serve the queue have in common."""
        return f"{self.task}.{self.target}"


def embed_queue(space: str, lane: Lane, tenant: str = DEFAULT_TENANT) -> QueueName:
    """The queue of texts to embed into ``space``."""
    return QueueName(tenant, "embed", space, lane)


def rerank_queue(space: str, lane: Lane, tenant: str = DEFAULT_TENANT) -> QueueName:
    """The queue of pairs to score with the model whose space id is ``space``."""
    return QueueName(tenant, "rerank", space, lane)


def merge_queue(uid: str, tenant: str = DEFAULT_TENANT, partition: int = 0) -> QueueName:
    """The queue of shards on their way into a collection's partition."""
    return QueueName(tenant, "merge", f"{uid}-{partition}", "bulk")


def search_queue(home: str = DEFAULT_HOME, tenant: str = DEFAULT_TENANT) -> QueueName:
    """The queue of reads that the search process of ``home`` answers."""
    return QueueName(tenant, "search", home, "interactive")


def catalog_queue(home: str = DEFAULT_HOME, tenant: str = DEFAULT_TENANT) -> QueueName:
    """The queue of creations and deletions of collections, answered by the aggregator."""
    return QueueName(tenant, "catalog", home, "interactive")


def queue_list(queue: object) -> str:
    """RQ's list of waiting job ids."""
    return f"rq:queue:{queue}"


def job(job_id: str) -> str:
    """RQ's hash of one job."""
    return f"rq:job:{job_id}"


def dead(queue: object) -> str:
    """The dead letter of a queue: RQ's failed registry."""
    return f"rq:failed:{queue}"


def lease(queue: object) -> str:
    """The leases of the jobs that were claimed from ``queue``."""
    return f"vf:lease:{queue}"


def parked(queue: object) -> str:
    """What waits until a merge queue has room."""
    return f"vf:parked:{queue}"


def load(queue: object) -> str:
    """What waits in ``queue``: tokens, bytes, jobs."""
    return f"vf:load:{queue}"


def bell(queue: QueueName) -> str:
    """Where a worker without work waits."""
    return f"vf:bell:{queue.line}"


def line(queue: QueueName) -> str:
    """The queues of all tenants for the same work that have something waiting, by turns."""
    return f"vf:line:{queue.line}"


def busy(queue: QueueName) -> str:
    """The queues of all tenants for the same work in which there may be leases."""
    return f"vf:busy:{queue.line}"


def load_of_all(queue: QueueName) -> str:
    """What waits in the queues of all tenants for the same work, or in all merge queues."""
    return f"vf:sum:{'merge' if queue.task == 'merge' else queue.line}"


def poison(pool: str) -> str:
    """The texts of which the pool's workers have died lately."""
    return f"vf:poison:{pool}"


def alive(box: str) -> str:
    """The sign of life of a client that waits for replies."""
    return f"vf:alive:{box}"


def reply(box: str) -> str:
    """The replies for one client."""
    return f"vf:reply:{box}"


def submission(submission_id: str) -> str:
    """A submission's progress."""
    return f"vf:sub:{submission_id}"


def collections(tenant: str = DEFAULT_TENANT) -> str:
    """The copy of the catalogue for one tenant."""
    return f"vf:collections:{tenant}"


def version(uid: str) -> str:
    """The last version assigned in a collection."""
    return f"vf:version:{uid}"


def outstanding(uid: str) -> str:
    """The versions of a collection that are still on their way."""
    return f"vf:outstanding:{uid}"


def model(name: str) -> str:
    """A model's card."""
    return f"vf:model:{name}"


def live(pool: str) -> str:
    """The workers that serve a pool."""
    return f"vf:live:{pool}"


def writer(home: str) -> str:
    """The lease of a home's only writer."""
    return f"vf:writer:{home}"


def worker(name: str) -> str:
    """What a worker says of itself, beside RQ's own hash."""
    return f"vf:worker:{name}"
