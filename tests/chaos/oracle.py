"""Whether the promise was kept: ledgers against index, dead letter, and what Redis holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis
from chaos import settlements
from chaos.client_ledger import read
from chaos.complaints import complaints
from chaos.fleet import ASSIGNED, GIVEN, Fleet
from chaos.leftovers import acknowledged_submissions, check_counts, dead_jobs, wait_until_quiet
from chaos.story import may_die, text_of
from chaos.verdict import Buried, Held, Verdict, judge

from vecfleet.common.codec import inflate, loads, unpack_call
from vecfleet.common.errors import VecfleetError
from vecfleet.producer.sync_producer import Producer
from vecfleet.worker.catalog import Catalog
from vecfleet.worker.digest import id_keys
from vecfleet.worker.fake_engine import fake_vector
from vecfleet.worker.partition_reader import PartitionReader
from vecfleet.worker.shard import MAGIC, Shard

_SEARCHED = 150


def dead_letter(client: redis.Redis) -> list[Buried]:
    """All documents in the dead letter, at whichever stage they were buried."""
    found = []
    for _, job in dead_jobs(client):
        data, error = client.hmget(f"rq:job:{job}", "data", "vf_error")  # type: ignore[misc]
        why = str(loads(error).get("message", "")) if error else ""
        found += [Buried(job, id, text, why) for id, text in _documents_of(data or b"")]
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
        if payload.keys() >= {"ids", "texts"}:  # else a call: a query, a collection's creation
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
    verdict.stuck += wait_until_quiet(fleet, quiet_s)
    entries = [entry for path in fleet.ledgers() for entry in read(path)]
    if fleet.cuts:  # the dead letter is Redis's, and goes with its data
        entries = [entry for entry in entries if not may_die(text_of(entry.id, entry.revision))]
    buried = dead_letter(fleet.redis)
    notes = list(settlements.read(fleet.redis))
    try:
        wrong = searched(fleet, read_index(fleet.data))
    except (VecfleetError, AssertionError) as error:
        wrong = [f"the index cannot be read: {error!r}"]
    verdict.lost += wrong
    for slot in fleet.of("aggregator"):
        slot.end()
    try:
        held = read_index(fleet.data)
        verdict.lost += complaints(fleet, held)
        deaths = settlements.worker_deaths(notes)
        judge(entries, held, buried, verdict, deaths, redis_lost_data=redis_lost_data)
    except (VecfleetError, AssertionError) as error:
        verdict.lost.append(f"the index cannot be read: {error!r}")
    if not redis_lost_data:
        check_counts(fleet.redis, acknowledged_submissions(fleet), buried, verdict)
        verdict.doubled += settlements.settled_twice(notes)
    return verdict
