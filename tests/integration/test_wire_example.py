"""The programs printed in docs/wire.md, run as they stand there against a real fleet."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import Process

from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.redis_client import connect_async
from vecfleet.worker.fake_engine import fake_vector

ROOT = Path(__file__).parents[2]
ROLES = ROOT / "tests" / "roles.py"
DIMENSION = 32
RUN_S = 60


def example(name: str) -> str:
    """The Python program of docs/wire.md that stands below ``<!-- example: NAME -->``."""
    page = (ROOT / "docs" / "wire.md").read_text()
    found = re.search(rf"<!-- example: {re.escape(name)} -->\n```python\n(.*?)\n```", page, re.S)
    assert found, f"docs/wire.md has no example {name}"
    return found[1]


@pytest.fixture
def fleet(redis_server_factory, each_redis_binary, tmp_path) -> Iterator[str]:
    """The URL of a Redis with a worker, an aggregator and a search process behind it."""
    url = redis_server_factory(binary=each_redis_binary, append_only=False).url
    started: list[Process] = []
    try:
        for role in ("aggregator", "search", "worker"):
            process = Process([sys.executable, str(ROLES), role, url, str(tmp_path / "data"), "0"])
            started.append(process)
            process.wait_for_line(f"{role} ready")
        yield url
    finally:
        for process in started:
            process.close()


@pytest.fixture
def run(tmp_path) -> Callable[..., str]:
    def run_example(name: str, *arguments: str) -> str:
        program = tmp_path / name
        program.write_text(example(name))
        done = subprocess.run(
            [sys.executable, str(program), *arguments],
            capture_output=True,
            text=True,
            timeout=RUN_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run_example


async def test_the_examples_do_what_they_say(fleet, run):
    async with FleetClient(connect_async(fleet), timeout_s=20) as client:
        collection = await client.create_collection("books", model="fake")
        arguments = (fleet, str(ROOT / "common"), "books")
        assert run("submit.py", *arguments).splitlines() == ["committed 600", "failed 0"]

        assert (await client.collection_stats(collection))["documents"] == 600
        text = "The book number 7."
        (hits,) = (
            await client.search(collection, fake_vector(text, DIMENSION).tobytes(), top_k=1)
        ).hits
        assert (hits[0].id, hits[0].text) == ("book/7", text)
        assert hits[0].metadata == {"from": "wire.md"}
        (before,) = await client.documents(collection, ["book/7"])

        # The same program again: the same submission, so nothing is queued and nothing changes.
        assert run("submit.py", *arguments).splitlines() == ["committed 600", "failed 0"]
        assert await client.documents(collection, ["book/7"]) == [before]
        assert await client.redis.keys("rq:job:*") == []

        told = run("embed.py", fleet, str(ROOT / "common"), "fake")
        assert told == f"vectors 2 of {DIMENSION}\n"


def test_a_collection_that_is_not_there_is_told(redis_url, tmp_path):
    program = tmp_path / "submit.py"
    program.write_text(example("submit.py"))
    done = subprocess.run(
        [sys.executable, str(program), redis_url, str(ROOT / "common"), "none"],
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    assert done.returncode == 1
    assert "there is no collection none" in done.stderr
