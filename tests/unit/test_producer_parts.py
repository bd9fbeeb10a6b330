"""The producer's small parts: patience, the window, bits, ids, imports."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vecfleet.common.collection import Collection, CollectionSpec
from vecfleet.common.errors import ConfigError, InvalidInput, QueueFull
from vecfleet.common.hashing import id_key
from vecfleet.producer.block_states import Bits
from vecfleet.producer.cutting import CutBlock
from vecfleet.producer.in_flight import InFlight, Sent
from vecfleet.producer.naming import submission_id
from vecfleet.producer.options import SubmitOptions
from vecfleet.producer.patience import Patience
from vecfleet.producer.pulling import WorkLine
from vecfleet.producer.unchanged import SentIds


def test_the_producer_loads_nothing_heavy():
    code = (
        "import sys, vecfleet.producer;"
        "from vecfleet.fleet import ingest_command, query_commands, status_command;"
        "from vecfleet.fleet import collections_command, dead_command;"
        "heavy = {'torch','vllm','faiss','fastapi','numpy','pyarrow','transformers','starlette'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_patience_ends_and_begins_anew():
    now = 0.0
    patience = Patience(10.0, clock=lambda: now)
    pauses = []
    for _ in range(12):
        pauses.append(patience.failed(QueueFull("full")))
        now += pauses[-1]
    assert pauses == sorted(pauses) and pauses[-1] <= 0.5
    assert patience.trouble == "full"
    patience.ok()
    assert patience.trouble == ""
    now += 100
    patience.failed(QueueFull("full"))
    now += 10
    with pytest.raises(QueueFull, match="gave up after 10 s"):
        patience.failed(QueueFull("full"))


def block(place: int, size: int) -> Sent:
    cut = CutBlock(place)
    cut.block.ids.append("x")
    cut.block.size = size
    return Sent(cut)


async def test_the_window_holds_blocks_and_bytes_back():
    window = InFlight(max_blocks=3, max_bytes=100)
    window.add(block(0, 500))  # alone, whatever its size
    assert not window.has_room()
    waiting = asyncio.ensure_future(window.wait_for_room())
    await asyncio.sleep(0)
    assert not waiting.done()
    assert window.pop(0) is not None
    assert window.pop(0) is None
    async with asyncio.timeout(30):
        await waiting
    for place in (1, 2, 3):
        assert window.has_room()
        window.add(block(place, 10))
    assert not window.has_room() and window.documents == 3
    for place in (1, 2, 3):
        window.pop(place)
    async with asyncio.timeout(30):
        await window.wait_until_empty()


@given(st.sets(st.integers(0, 200)), st.sets(st.integers(0, 200)))
def test_bits_are_read_as_redis_writes_them(ok, bad):
    def bitmap(places: set[int]) -> bytes:
        raw = bytearray(max(places, default=-1) // 8 + 1)
        for place in places:
            raw[place // 8] |= 0x80 >> place % 8
        return bytes(raw)

    bits = Bits(bitmap(ok), bitmap(bad))
    for place in range(220):
        expected = "committed" if place in ok else "refused" if place in bad else "waiting"
        assert bits.fate(place) == expected


def test_sent_ids_are_never_forgotten_and_seldom_invented():
    ids = SentIds(bits=1 << 20)
    for i in range(10_000):
        ids.add(id_key(f"in-{i}"))
    assert all(id_key(f"in-{i}") in ids for i in range(10_000))
    assert sum(id_key(f"out-{i}") in ids for i in range(10_000)) < 100


def test_a_submissions_name_belongs_to_its_collection():
    spec = CollectionSpec("m", "s", 8)
    one, two = Collection("a", "1" * 32, spec), Collection("b", "2" * 32, spec)
    assert submission_id(one, "nightly") == submission_id(one, "nightly")
    assert submission_id(one, "nightly") != submission_id(two, "nightly")
    assert submission_id(one, "0" * 32) == "0" * 32
    for name in ("", "a\nb", "x" * 300):
        with pytest.raises(InvalidInput):
            submission_id(one, name)


def test_a_work_line_runs_in_the_serving_thread_and_survives_an_interrupt():
    line = WorkLine()
    seen = []

    def interrupted() -> None:
        raise KeyboardInterrupt

    first = line.submit(lambda: seen.append(threading.current_thread()))
    failing = line.submit(lambda: 1 / 0)
    line.submit(interrupted)
    last = line.submit(lambda: 5)
    line.shutdown()
    with pytest.raises(KeyboardInterrupt):
        line.serve()
    line.serve()
    assert seen == [threading.current_thread()] and first.done()
    assert isinstance(failing.exception(), ZeroDivisionError)
    assert last.result() == 5


def test_options_are_checked():
    with pytest.raises(ConfigError):
        SubmitOptions(max_blocks=0)
