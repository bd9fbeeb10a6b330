"""Metadata: what one door takes, every door takes, and every reader can read."""

from __future__ import annotations

import json
import logging

import orjson
import pytest

from vecfleet.common import metadata
from vecfleet.common.document import parse_document
from vecfleet.common.errors import InvalidInput
from vecfleet.common.limits import MAX_METADATA_BYTES
from vecfleet.common.metadata import MAX_DEPTH, check_metadata, encode_metadata, read_metadata
from vecfleet.common.rare_log import RareLog


def nested(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


GOOD = [
    {},
    {"a": None, "b": True, "c": 1.5, "d": "ä\U0001f600", "e": [1, {"f": []}]},
    {"n": 2**64 - 1, "m": -(2**63)},
    nested(MAX_DEPTH),
    {"brackets": "[{" * 1000},
]


@pytest.mark.parametrize("value", GOOD)
def test_what_is_taken_is_read_again_as_it_was_and_can_be_answered(value):
    encoded = encode_metadata(value)
    check_metadata(encoded)
    assert read_metadata(encoded, "a") == value
    assert orjson.loads(orjson.dumps(value)) == value


@pytest.mark.parametrize(
    "value",
    [
        {"n": 2**64},
        {"n": [2**64 + 1]},
        {"n": -(2**63) - 1},
        {"n": float("nan")},
        {"n": float("inf")},
        {"a": "\ud800"},
        {"\ud800": 1},
        {"a": {1, 2}},
        {"a": "x" * MAX_METADATA_BYTES},
        nested(MAX_DEPTH + 2),
        nested(900),
        [],
        "a",
        7,
    ],
)
def test_what_could_not_be_read_again_is_refused(value):
    with pytest.raises(InvalidInput) as caught:
        parse_document({"id": "a", "text": "a", "metadata": value})
    assert caught.value.field == "metadata"


def filled(count: int) -> dict:
    """Metadata of ``6 + 2 * count`` bytes."""
    return {"a": [1] * count + [10]}


@pytest.mark.parametrize(
    ("fits", "too_large"),
    [
        (filled(MAX_METADATA_BYTES // 2 - 5), filled(MAX_METADATA_BYTES // 2 - 3)),
        ({"a": [[]] * 5459}, {"a": [[]] * 5460}),
        ({"a": "x" * (MAX_METADATA_BYTES - 8)}, {"a": "x" * (MAX_METADATA_BYTES - 7)}),
        ({"x" * (MAX_METADATA_BYTES - 6): 1}, {"x" * (MAX_METADATA_BYTES - 5): 1}),
    ],
    ids=["numbers", "lists", "text", "name"],
)
def test_all_that_fits_is_taken(fits, too_large):
    assert len(encode_metadata(fits)) > MAX_METADATA_BYTES - 4
    with pytest.raises(InvalidInput, match="16384"):
        encode_metadata(too_large)


class Watched(list):
    """A list that counts how many of its entries are looked at."""

    seen = 0

    def __iter__(self):
        for entry in super().__iter__():
            Watched.seen += 1
            yield entry


@pytest.mark.parametrize(
    ("value", "most"),
    [
        (Watched([1] * 1_000_000), 1),
        (Watched(Watched([1] * 10) for _ in range(5_000)), MAX_METADATA_BYTES // 2),
        (Watched(["x" * 1000] * 5_000), 17),
        (Watched([{"x" * 1000: 1}] * 5_000), 17),
    ],
    ids=["numbers", "lists", "texts", "names"],
)
def test_what_cannot_fit_is_not_walked_to_its_end(value, most):
    Watched.seen = 0
    with pytest.raises(InvalidInput, match="16384"):
        encode_metadata({"a": value})
    assert Watched.seen <= most


DAMAGED = [
    b'{"a":"\\ud800"}',
    b'{"a":"\xff"}',
    b'{"a":NaN}',
    b'{"a":Infinity}',
    b'{"a":' * 900 + b"1" + b"}" * 900,
    b'{"a":' * 2000 + b"1" + b"}" * 2000,
    b"[]",
    b'"a"',
    b"",
    b"{",
    "{}",
    7,
]


@pytest.mark.parametrize("encoded", DAMAGED)
def test_a_worker_refuses_what_a_door_would_have(encoded):
    with pytest.raises(InvalidInput) as caught:
        check_metadata(encoded)
    assert caught.value.field == "metadata"


def test_a_worker_refuses_too_many_bytes():
    entry = json.dumps({"a": "x" * MAX_METADATA_BYTES}).encode()
    with pytest.raises(InvalidInput, match="16384"):
        check_metadata(entry)


@pytest.mark.parametrize("encoded", DAMAGED)
def test_an_index_that_holds_it_is_still_read(encoded):
    assert read_metadata(encoded, "a") is None
    assert read_metadata(None, "a") is None


def test_a_number_that_is_too_large_is_read_as_json_readers_do():
    found = read_metadata(b'{"n":18446744073709551617}', "a")
    assert found == {"n": 2.0**64}
    assert orjson.dumps(found)


def test_what_is_damaged_is_told_once_a_minute(monkeypatch, caplog):
    now = [0.0]
    log = RareLog(logging.getLogger("a"), clock=lambda: now[0])
    monkeypatch.setattr(metadata, "log", log)
    for document in ("first", "second", "third"):
        read_metadata(b"{", document)
    now[0] = 61.0
    read_metadata(b"{", "fourth")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "'first'" in said[0]
    assert "'fourth'" in said[1]
    assert "2 more" in said[1]
