"""The dead letter through its doors: the command, HTTP and Python, over a real fleet."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from servers import Process, eventually, start_role, wait_until

from vecfleet.common.document import parse_document
from vecfleet.common.errors import EmptyText, UnknownEntry
from vecfleet.fleet.cli import EXIT_INTERRUPTED, run
from vecfleet.producer import AsyncProducer, Producer
from vecfleet.worker.fake_engine import POISON

ROLES = Path(__file__).parent.parent / "roles.py"


@pytest.fixture
def fleet(redis_server_factory, tmp_path):
    """A fleet with a collection of 30 documents, three of which the model refused."""
    url = redis_server_factory().url
    processes = []
    for role in ("aggregator", "search", "worker"):
        process = Process([sys.executable, str(ROLES), role, url, str(tmp_path / "data"), "0"])
        processes.append(process)
    for process, role in zip(processes, ("aggregator", "search", "worker"), strict=True):
        process.wait_for_line(f"{role} ready")
    rows = [
        {"id": f"d{n}", "text": f"number {n} \x1b[31m {POISON if n % 10 == 5 else ''}"}
        for n in range(30)
    ]
    with Producer(url) as producer:
        producer.create_collection("books", model="fake")
        result = producer.submit([parse_document(row) for row in rows], collection="books")
        assert (result.committed, result.failed) == (27, 3)
    yield url
    for process in processes:
        process.close()


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def dead(url: str, *arguments: str) -> Done:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
        code = run(["dead", *arguments, "--redis", url])
    return Done(code, out.getvalue(), errors.getvalue())


def listed(url: str, *arguments: str):
    done = dead(url, "list", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["entries"]


async def there(url: str, *ids: str):
    async with AsyncProducer(url) as producer:

        async def found():
            documents = await producer.get("books", ids)
            return all(documents) and documents

        return await eventually(found)


def test_the_command(fleet, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    entries = listed(fleet)
    assert {e["documents"][0]["id"] for e in entries} == {"d5", "d15", "d25"}
    assert {e["error"]["code"] for e in entries} == {"engine_failed"}
    assert {e["collection"] for e in entries} == {"books"}
    by_document = {e["documents"][0]["id"]: e["id"] for e in entries}
    assert listed(fleet, "--code", "poison_text") == []
    assert listed(fleet, "--since", "2100-01-01") == []
    assert listed(fleet, "--tenant", "acme") == []
    assert len(listed(fleet, "--collection", "books", "--since", "1h", "-n", "2")) == 2
    assert dead(fleet, "list", "--collection", "none").returncode == 4
    assert dead(fleet, "list", "--since", "yesterday").returncode == 2

    plain = dead(fleet, "list")
    assert [line.split("\t")[1:4:2] for line in plain.stdout.splitlines()] == [
        ["books", "engine_failed"]
    ] * 3
    shown = dead(fleet, "show", by_document["d5"])
    assert POISON in shown.stdout and "engine_failed" in shown.stdout
    assert dead(fleet, "show", "nothing").returncode == 4
    assert "\x1b" in listed(fleet)[0]["documents"][0]["text"]
    assert "\x1b" not in shown.stdout + plain.stdout  # no document takes a terminal over

    assert dead(fleet, "retry").returncode == 2
    assert dead(fleet, "retry", by_document["d5"], "--text", " ").returncode == 2
    retried = dead(fleet, "retry", by_document["d5"], "--text", "number five, put right")
    assert (retried.returncode, retried.stdout) == (0, "queued again: 1\n")
    (found,) = asyncio.run(there(fleet, "d5"))
    assert found.text == "number five, put right"
    assert dead(fleet, "retry", by_document["d5"]).returncode == 4

    both = dead(fleet, "retry", by_document["d15"], "nothing", "--json")
    assert both.returncode == 1
    told = json.loads(both.stdout)
    assert told["done"] == [by_document["d15"]]
    assert told["failed"]["nothing"]["code"] == "dead_entry_not_found"
    wait_until(lambda: len(listed(fleet)) == 2)  # it failed again

    refused = dead(fleet, "drop", "--all", "--code", "engine_failed")
    assert refused.returncode == EXIT_INTERRUPTED  # nobody said yes
    dropped = dead(fleet, "drop", "--all", "--code", "engine_failed", "--yes")
    assert (dropped.returncode, dropped.stdout) == (0, "dropped: 2\n")
    assert listed(fleet) == []


async def test_over_http(fleet, tmp_path):
    settings = {"VECFLEET_REDIS_URL": fleet, "VECFLEET_DATA": str(tmp_path / "other")}
    process = start_role("gateway", "--port", "0", "--no-keys", env=settings)
    try:
        line = await asyncio.to_thread(process.wait_for_line, r"http://127\.0\.0\.1:\d+")
        port = line.rsplit("127.0.0.1:", 1)[1].split("/")[0].split('"')[0].split()[0].strip(",.")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            await over_http(fleet, http)
    finally:
        process.close()


async def over_http(fleet, http):
    seen, cursor = [], ""
    while True:
        page = (await http.get("/dead", params={"limit": 2, "cursor": cursor})).json()
        seen += page["entries"]
        cursor = page["cursor"]
        if cursor is None:
            break
    by_document = {e["documents"][0]["id"]: e["id"] for e in seen}
    assert set(by_document) == {"d5", "d15", "d25"}
    found = (await http.get("/dead", params={"collection": "books", "since": "1h"})).json()
    assert len(found["entries"]) == 3
    for wrong in ({"limit": "0"}, {"cursor": "?"}, {"since": "x"}, {"color": "red"}):
        assert (await http.get("/dead", params=wrong)).status_code == 400
    assert (await http.get("/dead", params={"collection": "none"})).status_code == 404

    one = f"/dead/{by_document['d5']}"
    entry = (await http.get(one)).json()
    assert entry["documents"] == [{"id": "d5", "text": f"number 5 \x1b[31m {POISON}"}]
    for wrong in ({"text": ""}, {"text": 5}, {"txt": "a"}, {"document": "d5"}, {"document": 5}):
        assert (await http.post(f"{one}/retry", json=wrong)).status_code == 400, wrong
    answer = await http.post(f"{one}/retry", json={"text": "put right"})
    assert (answer.status_code, answer.json()["queued"]) == (202, True)
    assert (await there(fleet, "d5"))[0].text == "put right"
    gone = await http.post(f"{one}/retry")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "dead_entry_not_found")

    again = f"/dead/{by_document['d15']}"
    assert (await http.post(f"{again}/retry")).status_code == 202

    async def failed_again():
        return (await http.get(again)).status_code == 200

    await eventually(failed_again)
    assert (await http.delete(again)).json() == {"id": by_document["d15"], "dropped": True}
    assert (await http.delete(again)).status_code == 404
    assert (await http.get("/dead/..%2F..%2Fetc")).status_code == 404
    await many_over_http(http)


async def many_over_http(http):
    """One entry, d25, is there."""
    for wrong in ({}, {"all": "true", "code": "engine_failed"}, {"all": "yes"}, {"all": "false"}):
        for method, path in (("POST", "/dead/retries"), ("DELETE", "/dead")):
            assert (await http.request(method, path, params=wrong)).status_code == 400, wrong
    (before,) = (await http.get("/dead")).json()["entries"]
    nothing = {"done": 0, "failed": [], "cursor": None}
    other = {"code": "poison_text"}
    assert (await http.delete("/dead", params=other)).json() == nothing
    answer = await http.post("/dead/retries", params={"collection": "books", "since": "1h"})
    assert (answer.status_code, answer.json()) == (200, {**nothing, "done": 1})

    async def failed_again():
        entries = (await http.get("/dead")).json()["entries"]
        return bool(entries) and entries[0]["died_at"] > before["died_at"]

    await eventually(failed_again)
    assert (await http.delete("/dead", params={"all": "true"})).json() == {**nothing, "done": 1}
    assert (await http.get("/dead")).json()["entries"] == []


async def test_a_retry_does_not_overwrite_what_came_later(fleet):
    async with AsyncProducer(fleet) as producer:
        (entry,) = [e for e in (await producer.dead()).entries if e.documents[0].id == "d25"]
        await producer.submit([{"id": "d25", "text": "newer"}], collection="books")
        await producer.retry_dead(entry.id, text="older, put right")
        client = await producer.fleet()

        async def committed():
            state = await client.submissions.get(entry.submission)
            return (state.committed, state.failed) == (28, 2)

        await eventually(committed)
        (found,) = await producer.get("books", ["d25"])
        assert found.text == "newer"
        with pytest.raises(UnknownEntry):
            await producer.dead_entry(entry.id)


def test_from_python(fleet):
    with Producer(fleet) as producer:
        page = producer.dead(collection="books", code="engine_failed", since="1h", limit=2)
        assert len(page.entries) == 2
        rest = producer.dead(cursor=page.cursor, limit=2)
        assert len(rest.entries) == 1
        entry = producer.dead_entry(rest.entries[0].id)
        with pytest.raises(EmptyText):
            producer.retry_dead(entry.id, text="")
        producer.retry_dead(entry.id, text="better")
        producer.drop_dead(page.entries[0].id)
        with pytest.raises(UnknownEntry):
            producer.drop_dead(page.entries[0].id)
