"""What is left in Redis when nothing runs any more, and whether its counts are true."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import redis
from chaos.client_ledger import read
from chaos.fleet import Fleet
from chaos.verdict import Buried, Verdict

from vecfleet.common import keys
from vecfleet.common.codec import loads
from vecfleet.common.collection import Collection
from vecfleet.common.submission import id_of_name

_POLL_S = 0.05
_GONE_AT_THE_END = (
    "rq:execution:",
    "rq:queue:",
    "rq:wip:",
    "vf:clock:",
    "vf:lease:",
    "vf:line:",
    "vf:load:",
    "vf:parked:",
    "vf:sum:",
)


def wait_until_quiet(
    fleet: Fleet, deadline_s: float, *, redis_lost_data: bool = False
) -> list[str]:
    """Wait until nothing is on its way; what still is at the deadline.

    A Redis that lost data may have gone back to when a submission that is done was open.
    """
    end = time.monotonic() + deadline_s
    submissions: Mapping[str, int] = {}
    while True:
        try:
            if not (submissions or redis_lost_data):
                submissions = acknowledged_submissions(fleet)
            left = unfinished(fleet.redis, submissions)
        except redis.RedisError as error:
            left = [f"Redis: {error}"]
        if not left or time.monotonic() > end:
            return left
        fleet.tend()
        time.sleep(_POLL_S)


def unfinished(client: redis.Redis, submissions: Iterable[str] = ()) -> list[str]:
    """Jobs, leases and ``submissions`` that are not over, and keys that should be gone."""
    left: list[str] = []
    dead = {id for _, id in dead_jobs(client)}
    kept: set[str] = set()
    names = sorted({raw.decode() for raw in client.scan_iter(count=1000)})
    for name in names:
        if name.startswith("rq:finished:"):
            kept |= {i.decode() for i in client.zrange(name, 0, -1)}  # type: ignore[union-attr]
    for name in names:
        is_job = name.startswith("rq:job:") and name[7:] not in dead | kept
        if is_job or name.startswith(_GONE_AT_THE_END):
            left.append(name)
        elif name.startswith("vf:outstanding:"):
            members: Any = client.zrange(name, 0, -1)
            left += [f"{name} {m.decode()}" for m in members if m.decode() not in dead]
    for submission in submissions:
        told: Any = client.hgetall(keys.submission(submission))
        if told.get(b"state") != b"done":
            state = told.get(b"state", b"unknown").decode()
            left.append(f"submission {submission} is {state}: {told}")
    return left


def acknowledged_submissions(fleet: Fleet) -> dict[str, int]:
    """The submissions that were acknowledged under a name, and how many documents each has.

    Deletions have no name.
    """
    records: Any = fleet.redis.hgetall(keys.collections())
    collections = {n.decode(): Collection.from_wire(loads(raw)) for n, raw in records.items()}
    return {
        id_of_name(collections[collection], f"{path.stem}-{revision - 1}"): count
        for path in fleet.ledgers()
        for (collection, revision), count in Counter(
            (entry.collection, entry.revision) for entry in read(path) if not entry.is_delete
        ).items()
    }


def check_counts(
    client: redis.Redis,
    submissions: Mapping[str, int],
    buried: Iterable[Buried],
    verdict: Verdict,
) -> None:
    """Each submission counts every document of it once, and as failed what was buried."""
    dead = Counter(one.submission for one in buried)
    for submission, documents in submissions.items():
        told: Any = client.hgetall(keys.submission(submission))
        good, bad = (
            int(told.get(name, 0)) for name in (b"committed_documents", b"failed_documents")
        )
        if (good, bad) == (documents - dead[submission], dead[submission]):
            continue
        wrong = verdict.doubled if good + bad > documents else verdict.lost
        wrong.append(
            f"submission {submission} of {documents} documents, {dead[submission]} of them in the "
            f"dead letter, counts {good} as committed and {bad} as failed"
        )


def dead_jobs(client: redis.Redis) -> Iterator[tuple[str, str]]:
    """The dead letter: registry and job of each entry."""
    for raw in client.scan_iter("rq:failed:*", count=1000):
        members: Any = client.zrange(raw, 0, -1)
        for member in members:
            yield raw.decode(), member.decode()
