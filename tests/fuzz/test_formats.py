"""What comes from outside as bytes: none of it escapes with an error that is not ours."""

from __future__ import annotations

import contextlib
import json
import struct
import zlib

import msgpack
import pytest
from fuzz.sizes import sized
from hypothesis import example, given
from hypothesis import strategies as st
from index_oracle import shard_bytes

from vecfleet.common import codec, keys
from vecfleet.common.document import cut_blocks, parse_document
from vecfleet.common.errors import (
    ConfigError,
    CorruptData,
    CorruptPayload,
    CorruptShard,
    InvalidInput,
    VecfleetError,
)
from vecfleet.gateway.body import parse_json
from vecfleet.gateway.lines import LineCutter
from vecfleet.producer.journal import Journal
from vecfleet.producer.readers import read_documents
from vecfleet.worker.job import decode_claim
from vecfleet.worker.page import read_page
from vecfleet.worker.shard import Shard

FAST = sized(200)
SHARD = shard_bytes("job-1", [(f"d{i}", i) for i in range(20)], [("gone", 3)])
QUEUE = keys.embed_queue("5pace", "bulk")

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
values = st.recursive(
    scalars,
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4)
    ),
    max_leaves=12,
)


@FAST
@given(values)
def test_what_was_packed_comes_back(value):
    packed = codec.dumps(value)
    assert codec.dumps(codec.loads(packed)) == packed


@FAST
@given(st.binary(max_size=200))
@example(b"\xdd\xff\xff\xff\xff")  # an array of four thousand million
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\x91" * 100_000)  # a hundred thousand levels
@example(b"\xd7\xff" + b"\xff" * 8)  # a time that is none
@example(b"\xc7\x00\x05")
@example(b"\x81\xc0\x01")  # a key that is no string
def test_rubbish_is_a_corrupt_payload_or_a_value(data):
    with contextlib.suppress(CorruptPayload):
        codec.loads(data)


@FAST
@given(
    data=st.binary(max_size=100)
    | values.map(codec.dumps)
    | values.map(lambda payload: codec.pack_call("vecfleet.embed", payload)),
    fields=st.lists(
        st.none() | st.binary(max_size=30) | st.just(b"9" * 5000) | st.just(b"1" * 400),
        min_size=16,
        max_size=16,
    ),
)
def test_any_row_of_a_claim_becomes_a_job(data, fields):
    row = [b"id", b"execution", b"queue", b"1700000000000000", data, *fields]
    job = decode_claim(row, QUEUE)
    assert job.error is None or (job.function, job.payload) == ("", None)
    assert job.block >= 0 and job.documents >= 0 and 0 <= job.version < 10**18


@FAST
@given(st.data())
def test_a_shard_with_a_lie_under_its_checksum_is_refused_or_readable(data):
    damaged = bytearray(SHARD)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(12, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    struct.pack_into("<I", damaged, 8, zlib.crc32(memoryview(damaged)[12:]))
    try:
        shard = Shard.parse(bytes(damaged))
    except CorruptShard:
        return
    for row in range(len(shard)):
        assert shard.rows.id(row)
        if not shard.rows.tombstones[row]:
            with contextlib.suppress(CorruptData):
                read_page(shard.rows.page(int(shard.rows.locators[row]) >> 5))


@FAST
@given(st.binary(max_size=300))
def test_bytes_are_no_shard_and_no_page(data):
    with pytest.raises(CorruptShard):
        Shard.parse(data)
    with pytest.raises(CorruptData):
        read_page(data)


documents = st.fixed_dictionaries(
    {"id": st.text(max_size=20), "text": st.text(max_size=40)},
    optional={
        "metadata": st.dictionaries(st.text(max_size=4), values, max_size=3) | values,
        "version": values,
        "other": values,
    },
)


@FAST
@given(st.lists(documents, max_size=8))
def test_documents_are_refused_by_name_or_travel_as_they_are(rows):
    good = []
    for row in rows:
        try:
            good.append(parse_document(row))
        except InvalidInput as error:
            assert error.field
    sent = [block.to_wire() for block in cut_blocks(good)]
    assert [i for wire in codec.loads(codec.dumps(sent)) for i in wire["ids"]] == [
        d.id for d in good
    ]


@FAST
@given(st.binary(max_size=200) | values.map(lambda v: json.dumps(v, default=str).encode()))
@example(b'{"a":NaN}')
@example(b'"\\ud800"')
@example(b"[" * 5000)
def test_a_body_is_json_or_invalid_input(raw):
    try:
        parse_json(raw)
    except InvalidInput as error:
        assert error.field == "body"


@FAST
@given(st.lists(st.binary(max_size=30), max_size=10), st.integers(1, 20))
def test_lines_are_the_same_however_the_stream_is_cut(parts, most):
    cutter, whole = LineCutter(most), LineCutter(most)
    found = [line for part in parts for line in cutter.feed(part)] + list(cutter.end())
    assert found == [*whole.feed(b"".join(parts)), *whole.end()]
    assert all(line.raw is None or len(line.raw) <= most for line in found)


RECORDS = [
    {"journal": 1, "submission": "s", "collection": "c", "uid": "u"},
    ["sent", 0, "digest", 7, 3, 0],
    ["done", 0, 3, 0],
    ["same", 1, "digest", 3],
]


@FAST
@given(st.data())
def test_a_damaged_journal_is_refused_or_continued(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "j"
    raw = bytearray("".join(json.dumps(record) + "\n" for record in RECORDS).encode())
    place = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        raw[place] = data.draw(st.integers(0, 255))
    else:
        del raw[place:]
    path.write_bytes(raw)
    try:
        journal = Journal.open(path, submission="s", collection="c", uid="u")
    except ConfigError:
        return
    if journal is not None:
        journal.close()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt", "rows.json"])
def test_files_of_rubbish_are_rejected_line_by_line(tmp_path, name):
    @FAST
    @given(st.binary(max_size=300))
    def check(raw):
        path = tmp_path / name
        path.write_bytes(raw)
        with contextlib.suppress(VecfleetError):
            list(read_documents([path]))

    check()


def test_a_bomb_does_not_become_what_it_says():
    bomb = zlib.compress(bytes(codec.MAX_PAYLOAD_BYTES + (1 << 20)), 9)
    with pytest.raises(CorruptPayload, match="more than"):
        codec.inflate(bomb)
    assert len(bomb) < 100_000
    with pytest.raises(CorruptPayload):
        codec.loads(msgpack.packb(None) + b"\xc0")
