"""What is left in Redis when nothing runs any more, and whether its counts are true."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection as Container
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import redis
from chaos.client_ledger import Call, read_calls, read_notes
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


def wait_until_quiet(fleet: Fleet, deadline_s: float) -> list[str]:
    """Wait until nothing is on its way; what still is at the deadline."""
    end = time.monotonic() + deadline_s
    submissions: Mapping[str, Call] = {}
    while True:
        try:
            if not submissions:
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
            jobs = [member.decode() for member in members]
            left += [f"{name} {job}" for job in jobs if _is_left(client, job, dead)]
    for submission in submissions:
        told: Any = client.hgetall(keys.submission(submission))
        if told.get(b"state") != b"done":
            state = told.get(b"state", b"unknown").decode()
            left.append(f"submission {submission} is {state}: {told}")
    return left


def _is_left(client: redis.Redis, job: str, dead: Container[str]) -> bool:
    """Whether the version of a job that has gone should be gone as well.

    The writer clears those of cancelled submissions away when it comes to them.
    """
    submission = keys.submission(job.partition("-")[0])
    return job not in dead and client.hget(submission, "state") != b"cancelled"


def acknowledged_submissions(fleet: Fleet) -> dict[str, Call]:
    """The submissions that were acknowledged under a name; deletions have none.

    Those are left out that Redis may have lost its account of.
    """
    collections: dict[str, Collection] = {}
    for tenant in fleet.tenants:
        records: Any = fleet.redis.hgetall(keys.collections(tenant))
        collections |= {n.decode(): Collection.from_wire(loads(raw)) for n, raw in records.items()}
    found: dict[str, Call] = {}
    for path in fleet.ledgers():
        # When Redis is known to have had the account; a client may do more with it afterwards.
        done = {note.fields["submission"]: note.at_s for note in read_notes(path, "done")}
        for call in read_calls(path):
            held_s = done.get(call.submission, call.at_s)
            if call.is_delete or call.collection not in collections or fleet.may_be_lost(held_s):
                continue
            found[id_of_name(collections[call.collection], f"{path.stem}-{call.number}")] = call
    return found


def check_counts(
    client: redis.Redis,
    submissions: Mapping[str, Call],
    buried: Iterable[Buried],
    verdict: Verdict,
) -> None:
    """Each submission counts every document of it once, as failed what was buried or dropped."""
    dead = Counter(one.submission for one in buried)
    for submission, call in submissions.items():
        documents, failed = call.documents, dead[submission] + call.dropped
        told: Any = client.hgetall(keys.submission(submission))
        good, bad = (
            int(told.get(name, 0)) for name in (b"committed_documents", b"failed_documents")
        )
        if (good, bad) == (documents - failed, failed):
            continue
        wrong = verdict.doubled if good + bad > documents else verdict.lost
        wrong.append(
            f"submission {submission} of {documents} documents, {failed} of them in the dead "
            f"letter or dropped, counts {good} as committed and {bad} as failed"
        )


def dead_jobs(client: redis.Redis) -> Iterator[tuple[str, str]]:
    """The dead letter: registry and job of each entry."""
    for raw in client.scan_iter("rq:failed:*", count=1000):
        members: Any = client.zrange(raw, 0, -1)
        for member in members:
            yield raw.decode(), member.decode()
