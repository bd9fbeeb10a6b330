"""A job's data: what is small on the wire must not become large in memory."""

from __future__ import annotations

import struct
import tracemalloc
import zlib

import msgpack
import pytest

from vecfleet.common import codec, keys, payloads
from vecfleet.common.document import Block, Document
from vecfleet.common.errors import CorruptPayload
from vecfleet.worker.job import decode_claim

QUEUE = keys.embed_queue("5pace", "bulk")
ROOM = codec.MAX_PAYLOAD_BYTES - 64


def row(data: bytes) -> list[bytes | None]:
    return [b"j", b"x", b"q", b"1700000000000000", data] + [None] * 16


def call(payload: bytes) -> bytes:
    return b"\x94" + codec.dumps(payloads.EMBED) + b"\xc0\x91" + payload + b"\x80"


def array(count: int) -> bytes:
    return b"\xdd" + struct.pack(">I", count)


BOMBS = {
    "one long array of maps": array(ROOM) + b"\x80" * ROOM,
    "one long array of nils": array(ROOM) + b"\xc0" * ROOM,
    "many arrays": array(2000) + (array(4000) + b"\x80" * 4000) * 2000,
    "arrays in arrays": b"\x91" * 1000 + b"\xc0",
    "many small maps": array(4000) + b"\x81\xa1a\x80" * 4000,
    "one map of many": b"\xdf" + struct.pack(">I", 1 << 20),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("compressed", [True, False])
def test_data_that_would_grow_is_refused_and_takes_no_memory(name, compressed):
    plain = call(BOMBS[name])
    data = zlib.compress(plain, 9) if compressed else plain
    tracemalloc.start()
    job = decode_claim(row(data), QUEUE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(job.error, CorruptPayload)
    assert peak < 3 * codec.MAX_PAYLOAD_BYTES


def test_the_windows_are_charged_what_a_job_has_in_memory():
    plain = codec.pack_call(payloads.EMBED, {"texts": ["a" * 200_000]})
    data = zlib.compress(plain, 9)
    job = decode_claim(row(data), QUEUE)
    assert job.error is None
    assert job.size == len(plain) > 100 * len(data)
    assert job.tokens == len(plain) // 4
    assert decode_claim(row(plain), QUEUE).size == len(plain)


def test_memory_that_is_not_there_is_the_jobs_fault(monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(msgpack, "unpackb", fail)
    job = decode_claim(row(b"\x90"), QUEUE)
    assert isinstance(job.error, CorruptPayload)
    assert "memory" in job.error.message


def test_the_largest_block_of_ours_passes():
    block = Block()
    for n in range(256):
        block.add(Document(f"d{n}", "a text", b'{"a":[[[[]]]]}', n + 1, 20))
    data = codec.pack_call(payloads.EMBED, {**block.to_wire(), "truncate": True, "uid": "u"})
    assert decode_claim(row(data), QUEUE).payload["ids"] == block.ids
