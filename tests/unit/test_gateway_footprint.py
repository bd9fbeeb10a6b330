"""What parsed JSON takes in memory: told before it is parsed, and held while it lives."""

import asyncio
import gc
import random
import tracemalloc

import orjson
import pytest
from gateway_fakes import FakeFleet, gateway_client

from vecfleet.common.errors import InvalidInput
from vecfleet.gateway import footprint as module
from vecfleet.gateway.body import parse_json
from vecfleet.gateway.config import GatewayLimits
from vecfleet.gateway.footprint import footprint

MANY = 1 << 40
N = 30_000


def listed(*entries):
    return b"[" + b",".join(entries) + b"]"


def numbered(form, count=N):
    return [form.replace(b"%", b"%x" % (i + 4096)) for i in range(count)]


DENSE = {
    "lists": listed(*[b"[]"] * N),
    "filled lists": listed(*[b"[1]"] * N),
    "deep lists": listed(*[b"[" * 500 + b"]" * 500] * 60),
    "dicts": listed(*[b"{}"] * N),
    "filled dicts": listed(*[b'{"a":1}'] * N),
    "deep dicts": listed(*[b'{"a":' * 500 + b"1" + b"}" * 500] * 60),
    "large dicts": listed(*[b"{" + b",".join(numbered(b'"%":1', 11)) + b"}"] * 5000),
    "whole numbers": listed(*numbered(b"9%".replace(b"%", b"99"))),
    "numbers": listed(*[b"1.5"] * N),
    "texts": listed(*numbered(b'"%"')),
    "texts of two bytes a character": listed(*['"\u0101\u0101"'.encode()] * N),
    "names": b"{" + b",".join(numbered(b'"%":1.5')) + b"}",
    "names and texts": listed(*numbered(b'{"%":"%"}')),
}


@pytest.mark.parametrize("raw", DENSE.values(), ids=DENSE.keys())
async def test_it_is_about_what_python_takes(raw):
    told = len(raw) + await footprint(raw, MANY)
    gc.collect()
    tracemalloc.start()
    try:
        value = orjson.loads(raw)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert value
    assert taken <= told <= 6 * taken


def exact(value):
    """What the figure shall be: by what was parsed."""
    if isinstance(value, str):
        return 80
    if not isinstance(value, list | dict):
        return 0
    size = (200 if isinstance(value, dict) else 88) + 40 * max(0, len(value) - 1)
    if isinstance(value, dict):
        size += 80 * len(value)
    return size + sum(map(exact, value.values() if isinstance(value, dict) else value))


def some_json(rng, depth=4):
    kind = rng.randrange(5 if depth else 3)
    if kind == 0:
        return rng.randrange(1000)
    if kind <= 2:
        return "".join(rng.choices('[{,"\\ab\u00e4\n', k=rng.randrange(12)))
    entries = [some_json(rng, depth - 1) for _ in range(rng.randrange(6))]
    return entries if kind == 3 else {f'{i}"[': entry for i, entry in enumerate(entries)}


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 1 << 18])
async def test_what_stands_in_texts_does_not_count_wherever_a_step_ends(monkeypatch, step):
    monkeypatch.setattr(module, "_ROUGH_BYTES", -1)
    monkeypatch.setattr(module, "_STEP_BYTES", step)
    rng = random.Random(7)
    for _ in range(300):
        value = some_json(rng)
        assert await footprint(orjson.dumps(value), MANY) == exact(value), value


async def test_counting_ends_where_it_is_too_much():
    raw = listed(*[b"[]"] * 1_000_000)
    assert 1 << 21 < await footprint(raw, 1 << 21) < 64 << 20 < await footprint(raw, MANY)


def test_cycles_are_not_looked_for_while_a_body_is_parsed():
    begun = []
    gc.callbacks.append(lambda phase, _: begun.append(phase))
    try:
        assert len(parse_json(DENSE["lists"])) == N
    finally:
        gc.callbacks.pop()
    assert len(begun) < 10
    with pytest.raises(InvalidInput):
        parse_json(b"[")
    assert gc.isenabled()


EMBEDDINGS = "/v1/embeddings"


async def test_what_is_parsed_counts_among_the_bodies_until_its_request_is_over():
    fleet = FakeFleet()
    fleet.hang = True
    many = {"input": ["a"] * 2000}  # 8 KB, and 200 KB when it is parsed
    async with gateway_client(fleet, GatewayLimits(max_buffered_bytes=500_000)) as client:
        first = asyncio.create_task(client.post(EMBEDDINGS, json=many))
        while not fleet.calls:
            await asyncio.sleep(0)
        second = await client.post(EMBEDDINGS, json=many)
        fleet.stuck.set()
        assert (await first).status_code == 200
        third = await client.post(EMBEDDINGS, json=many)
    assert (second.status_code, second.headers["retry-after"]) == (503, "1")
    assert third.status_code == 200


async def test_values_that_no_share_could_ever_hold_are_refused_for_good():
    limits = GatewayLimits(max_buffered_bytes=4 << 20)
    body = b'{"input":["a"],"model":%b}' % listed(*[b"[]"] * 100_000)
    async with gateway_client(FakeFleet(), limits) as client:
        answer = await client.post(EMBEDDINGS, content=body)
        after = await client.post(EMBEDDINGS, json={"input": "a"})
    assert answer.status_code == 400
    assert "too many values" in answer.json()["error"]["message"]
    assert after.status_code == 200


async def test_a_body_of_half_of_all_has_room_for_as_many_values():
    """The largest that a gateway may be told to take."""
    limits = GatewayLimits(max_buffered_bytes=16 << 20)
    rows = [{"id": str(i), "text": "a" * 200_000} for i in range(40)]
    async with gateway_client(FakeFleet(), limits, max_body_bytes=8 << 20) as client:
        await client.put("/collections/books")
        body = orjson.dumps({"documents": rows}).ljust(8 << 20)
        answer = await client.post("/collections/books/documents", content=body)
    assert answer.status_code == 202, answer.text


async def test_documents_full_of_brackets_are_taken():
    rows = [{"id": str(i), "text": 'a[{"\\' * 40_000} for i in range(20)]
    async with gateway_client(FakeFleet()) as client:
        await client.put("/collections/books")
        answer = await client.post("/collections/books/documents", json={"documents": rows})
    assert answer.status_code == 202, answer.text
    assert answer.json()["accepted"] == 20
