"""Whether the promise was kept: ledgers against index, dead letter, and what Redis holds."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import redis
from chaos.client_ledger import Entry, read
from chaos.fleet import ASSIGNED, GIVEN, Fleet, settled_lines
from chaos.story import digest, revision_of

from vecfleet.common import keys
from vecfleet.common.codec import inflate, loads, unpack_call
from vecfleet.common.collection import Collection
from vecfleet.common.errors import VecfleetError
from vecfleet.common.submission import id_of_name
from vecfleet.producer.sync_producer import Producer
from vecfleet.worker.catalog import Catalog
from vecfleet.worker.digest import id_keys
from vecfleet.worker.fake_engine import fake_vector
from vecfleet.worker.search_index import PartitionReader
from vecfleet.worker.shard import MAGIC, Shard

_COSINE = 0.9999
_SEARCHED = 150
_POLL_S = 0.05
_GONE_AT_THE_END = ("vf:lease:", "vf:load:", "rq:wip:", "rq:queue:", "rq:execution:")


@dataclass(slots=True)
class Verdict:
    """What is wrong, in words; empty lists are the promise kept."""

    acknowledged: int = 0  # documents, each call's apart
    documents: int = 0  # in the index
    dead: int = 0  # acknowledged and in the dead letter
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)

    @property
    def is_kept(self) -> bool:
        """Whether the promise was."""
        return not (self.lost or self.doubled or self.stuck)

    def __str__(self) -> str:
        said = []
        for name in ("lost", "doubled", "stuck"):
            found = getattr(self, name)
            said += [f"{name}: {line}" for line in found[:10]]
            if len(found) > 10:
                said.append(f"{name}: and {len(found) - 10} more")
        return "\n".join(said) or "the promise was kept"


@dataclass(slots=True)
class Held:
    """What one collection holds: of each id all (text, version) that can be seen."""

    visible: dict[str, list[tuple[str, int]]]
    vectors: dict[str, Any]


def wait_until_quiet(
    fleet: Fleet, deadline_s: float, *, redis_lost_data: bool = False
) -> list[str]:
    """Wait until nothing is on its way; what still is at the deadline.

    A Redis that lost data may have gone back to when a submission that is done was open.
    """
    end = time.monotonic() + deadline_s
    submissions: list[str] = []
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
    dead = {id for _, id in _buried(client)}
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
        if told and told[b"state"] != b"done":
            left.append(f"submission {submission} is {told[b'state'].decode()}: {told}")
    return left


def acknowledged_submissions(fleet: Fleet) -> list[str]:
    """Ids of the submissions that were acknowledged under a name; deletions have none."""
    records: Any = fleet.redis.hgetall(keys.collections())
    collections = {n.decode(): Collection.from_wire(loads(raw)) for n, raw in records.items()}
    return [
        id_of_name(collections[entry.collection], f"{path.stem}-{entry.revision - 1}")
        for path in fleet.ledgers()
        for entry in {(e.collection, e.revision): e for e in read(path) if not e.is_delete}.values()
    ]


def _buried(client: redis.Redis) -> Iterator[tuple[str, str]]:
    for raw in client.scan_iter("rq:failed:*", count=1000):
        members: Any = client.zrange(raw, 0, -1)
        for member in members:
            yield raw.decode(), member.decode()


def dead_letter(client: redis.Redis) -> dict[str, Counter[str]]:
    """Of each document id the digests of the texts in the dead letter; "" for a deletion."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for _, job_id in _buried(client):
        data: Any = client.hget(f"rq:job:{job_id}", "data")
        for id, text in _documents_of(data or b""):
            found[id]["" if text is None else digest(text)] += 1
    return found


def _documents_of(data: bytes) -> Iterator[tuple[str, str | None]]:
    """Ids and texts of a buried job, at whichever stage it was."""
    plain = inflate(data)
    payload: Any = plain
    if not plain.startswith(MAGIC):
        payload = unpack_call(plain)[1][0]
    if isinstance(payload, dict) and "delete" in payload:
        for id in payload["delete"]:
            yield id, None
    elif isinstance(payload, dict):
        yield from zip(payload["ids"], payload["texts"], strict=True)
    else:
        yield from _documents_of_shard(Shard.parse(payload))


def _documents_of_shard(shard: Shard) -> Iterator[tuple[str, str | None]]:
    from vecfleet.worker.page import SLOT_BITS, read_page

    for row in range(len(shard)):
        if shard.rows.tombstones[row]:
            yield shard.rows.id(row), None
        else:
            locator = int(shard.rows.locators[row])
            page = read_page(shard.rows.page(locator >> SLOT_BITS))
            yield shard.rows.id(row), page[locator & ((1 << SLOT_BITS) - 1)][0]


def read_index(data: Path) -> dict[str, Held]:
    """Every collection, read with the index library."""
    catalog = Catalog.open(data / "index")
    try:
        held = {}
        for collection in catalog.list():
            reader = PartitionReader.open(catalog.directory(collection))
            visible: dict[str, list[tuple[str, int]]] = defaultdict(list)
            for document in reader.documents():
                visible[document.id].append((document.text, document.version))
            ids = list(visible)
            found, vectors = reader.vectors(id_keys(ids)) if ids else ((), ())
            assert all(found)
            assert reader.stats().documents == sum(map(len, visible.values()))
            assert not reader.stats().quarantined, reader.stats().quarantined
            held[collection.name] = Held(visible, dict(zip(ids, vectors, strict=True)))
            reader.close()
        return held
    finally:
        catalog.close()


def judge(
    entries: Iterable[Entry],
    held: dict[str, Held],
    dead: dict[str, Counter[str]],
    verdict: Verdict,
) -> None:
    """Compare; adds to ``verdict``."""
    newest: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        verdict.acknowledged += 1
        key = entry.collection, entry.id
        if key not in newest or newest[key].revision < entry.revision:
            newest[key] = entry
    for name, collection in held.items():
        verdict.documents += len(collection.visible)
        for id, copies in collection.visible.items():
            if len(copies) > 1:
                verdict.doubled.append(f"{name}/{id} is there {len(copies)} times: {copies}")
            _check_copy(name, id, copies[-1], collection, verdict)
            for text, _ in copies:
                if dead[id][digest(text)]:
                    verdict.doubled.append(f"{name}/{id} is in the index and in the dead letter")
    for (name, id), entry in newest.items():
        copies = held[name].visible.get(id, []) if name in held else []
        seen = max((revision_of(id, text) for text, _ in copies), default=0)
        if (seen == 0) if entry.is_delete else (seen >= entry.revision):
            continue
        if dead[id][entry.digest]:
            verdict.dead += 1
        elif seen > entry.revision:
            continue  # a deletion that a later write, on its way when the run ended, undid
        else:
            wanted = "its deletion" if entry.is_delete else "it"
            verdict.lost.append(
                f"{name}/{id}: {wanted} was acknowledged as revision {entry.revision}, "
                f"the index has {seen or 'none'}"
            )


def _check_copy(
    name: str, id: str, copy: tuple[str, int], collection: Held, verdict: Verdict
) -> None:
    text, version = copy
    revision = revision_of(id, text)
    if not revision:
        verdict.lost.append(f"{name}/{id} has a text that nobody wrote: {text[:60]!r}")
        return
    if name == GIVEN and version != revision:
        verdict.lost.append(f"{name}/{id} has version {version} with the text of {revision}")
    stored = collection.vectors[id].astype(np.float32)
    wanted = fake_vector(text, len(stored))
    cosine = float(stored @ wanted / (np.linalg.norm(stored) or 1.0))
    if cosine < _COSINE:
        verdict.lost.append(f"{name}/{id} has another vector than its text: cosine {cosine:.4f}")


def settled_twice(folder: Path) -> list[str]:
    """Jobs that were settled more than once at one stage; Redis may not have lost anything."""
    counts = Counter(
        (job, queue)
        for _, _, job, queue, outcome in settled_lines(folder)
        if outcome not in ("Release", "Failure") and len(job) > 32 and ".search." not in queue
    )
    return [
        f"{job} was settled {n} times in {queue}" for (job, queue), n in counts.items() if n > 1
    ]


def searched(fleet: Fleet, held: dict[str, Held]) -> list[str]:
    """Ask the search process for some of the documents; what it answers otherwise."""
    wrong = []
    with Producer(fleet.server.url, timeout_s=10.0) as producer:
        for name in (ASSIGNED, GIVEN):
            visible = held[name].visible
            for id in sorted(visible)[:: max(1, len(visible) // _SEARCHED)]:
                text = visible[id][-1][0]
                vector = fake_vector(text, len(held[name].vectors[id]))
                try:
                    hits = producer.search(name, vector=vector, top_k=3)
                except VecfleetError as error:
                    wrong.append(f"search in {name}: {error}")
                    break
                if not hits or hits[0].id != id or hits[0].text != text:
                    wrong.append(f"search in {name} does not find {id}: {hits[:1]}")
                if len({hit.id for hit in hits}) < len(hits):
                    wrong.append(f"search in {name} finds one document twice: {hits}")
    return wrong


def examine(fleet: Fleet, *, quiet_s: float, redis_lost_data: bool = False) -> Verdict:
    """The verdict over a fleet whose clients have ended; ends its writers."""
    verdict = Verdict()
    verdict.stuck += wait_until_quiet(fleet, quiet_s, redis_lost_data=redis_lost_data)
    entries = [entry for path in fleet.ledgers() for entry in read(path)]
    dead = dead_letter(fleet.redis)
    try:
        wrong = searched(fleet, read_index(fleet.data))
    except (VecfleetError, AssertionError) as error:
        wrong = [f"the index cannot be read: {error!r}"]
    verdict.lost += wrong
    for slot in fleet.of("aggregator"):
        slot.end()
    try:
        judge(entries, read_index(fleet.data), dead, verdict)
    except (VecfleetError, AssertionError) as error:
        verdict.lost.append(f"the index cannot be read: {error!r}")
    if not redis_lost_data:
        verdict.doubled += settled_twice(fleet.folder)
    return verdict
