"""Jobs that came compressed: one claim takes no more of them than it has room for in memory."""

from __future__ import annotations

import zlib

from vecfleet.common import codec, keys, payloads
from vecfleet.common.redis_client import connect
from vecfleet.worker import ledger as ledger_module
from vecfleet.worker.ledger import Ask, Ledger

QUEUE = keys.embed_queue("5pace", "bulk")
SIZE = 100_000


def put(client, name, data):
    fields = {"status": "queued", "origin": str(QUEUE), "data": data}
    client.hset(keys.job(name), mapping=fields)
    client.rpush(keys.queue_list(QUEUE), name)


def test_a_claim_decompresses_what_it_has_room_for(redis_url, monkeypatch):
    monkeypatch.setattr(ledger_module, "_INFLATED_BYTES", 3 * SIZE)
    plain = codec.pack_call(payloads.EMBED, {"texts": ["a" * SIZE]})
    small = codec.pack_call(payloads.EMBED, {"texts": ["a"]})
    with connect(redis_url) as client:
        for n in range(20):
            put(client, f"j{n}", zlib.compress(plain, 9))
        put(client, "plain", small)
        ledger = Ledger(client, "w")
        taken = []
        while jobs := ledger.claim([Ask(QUEUE, 100, 1 << 30)]):
            compressed = [job for job in jobs if job.id != "plain"]
            assert sum(job.size for job in compressed) <= 4 * SIZE
            assert all(job.error is None and job.attempts == 1 for job in jobs)
            taken += [job.id for job in compressed]
        assert taken == [f"j{n}" for n in range(20)]
        assert client.zcard(keys.lease(QUEUE)) == 21
