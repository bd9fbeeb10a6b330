"""``vecfleet ingest`` and its sisters as processes, against a real worker, index and search."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import Process, module_or_skip, wait_until

from vecfleet.common import keys
from vecfleet.common.redis_client import connect
from vecfleet.fleet.process import role_command
from vecfleet.producer import Producer

ROLES = Path(__file__).parent.parent / "roles.py"
DOCUMENTS = 6000


@pytest.fixture
def fleet(redis_server_factory, tmp_path):
    """The URL of a fleet whose engine takes its time."""
    url = redis_server_factory().url
    processes = []
    for role in ("aggregator", "search", "worker"):
        arguments = [sys.executable, str(ROLES), role, url, str(tmp_path / "data"), "0.05"]
        processes.append(Process(arguments))
    for role, process in zip(("aggregator", "search", "worker"), processes, strict=True):
        process.wait_for_line(f"{role} ready")
    yield url
    for process in processes:
        process.close()


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "documents.jsonl"
    rows = (json.dumps({"id": f"d{i}", "text": f"number {i}", "n": i}) for i in range(DOCUMENTS))
    path.write_text("".join(row + "\n" for row in rows))
    return path


def environment(url: str, tmp_path: Path) -> dict[str, str]:
    return {"VECFLEET_REDIS_URL": url, "VECFLEET_DATA": str(tmp_path / "client")}


def command(url: str, tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    process = Process(
        role_command(*map(str, arguments)), env=environment(url, tmp_path), cwd=tmp_path
    )
    code = process.wait(60)
    return subprocess.CompletedProcess(arguments, code, process.output)


def every_document_once(url: str) -> None:
    with Producer(url) as producer:

        def counted():
            """None where the search process did not answer within two seconds."""
            (status,) = producer.status().collections
            return status.stats

        assert wait_until(counted)["documents"] == DOCUMENTS
        found = producer.get("c", [f"d{i}" for i in range(DOCUMENTS)])
        assert [d.text for d in found if d] == [f"number {i}" for i in range(DOCUMENTS)]


def some_are_settled(journal: Path) -> bool:
    raw = journal.read_bytes() if journal.exists() else b""
    return 0 < raw.count(b'"done"') < DOCUMENTS // 256


@contextmanager
def without_its_end(path: Path) -> Iterator[None]:
    """Meanwhile the file is a pipe that brings most of it: who reads it comes to no end."""
    raw = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    with path.open("r+b", buffering=0) as pipe:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)
        pipe.write(raw[: len(raw) * 9 // 10])
        yield
    path.unlink()
    path.write_bytes(raw)


def test_a_producer_killed_half_way_is_continued(fleet, documents, tmp_path):
    journal = tmp_path / "journal"
    order = ["ingest", str(documents), "-c", "c", "--journal", str(journal)]
    with without_its_end(documents):
        first = Process(role_command(*order), env=environment(fleet, tmp_path), cwd=tmp_path)
        wait_until(lambda: some_are_settled(journal), what="a settled block")
        first.kill()
    assert some_are_settled(journal)
    again = command(fleet, tmp_path, *order, "--json")
    assert again.returncode == 0, again.stdout
    result = json.loads(again.stdout.splitlines()[-1])
    assert (result["documents"], result["committed"]) == (DOCUMENTS, DOCUMENTS)
    every_document_once(fleet)
    with Producer(fleet) as producer:
        assert not producer.status().submissions


def test_ctrl_c_settles_what_is_sent_and_says_how_to_go_on(fleet, documents, tmp_path):
    order = ["ingest", str(documents), "-c", "c", "--submission", "night"]
    journals = tmp_path / "client" / "journals"
    with without_its_end(documents):
        first = Process(role_command(*order), env=environment(fleet, tmp_path), cwd=tmp_path)
        wait_until(lambda: any(map(some_are_settled, journals.glob("*"))), what="a settled block")
        first.signal(signal.SIGINT)
        first.wait_for_line("stopping")
        assert first.wait(60) == 130
    assert "go on with the same command" in first.output
    again = command(fleet, tmp_path, *order)
    assert again.returncode == 0, again.stdout
    every_document_once(fleet)


def test_the_commands_answer(fleet, documents, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a", "text": "number one"}\n{"id": "b", "text": }\n')
    rejects = tmp_path / "rejects.jsonl"
    done = command(fleet, tmp_path, "ingest", bad, "-c", "c", "--rejects", rejects)
    assert done.returncode == 1
    kept = tmp_path / "client" / "rejects"
    assert not kept.exists()
    assert "1 documents committed to c, 1 rejected" in done.stdout
    (line,) = rejects.read_text().splitlines()
    assert {"file": "bad.jsonl", "line": 2, "code": "invalid_input"}.items() <= json.loads(
        line
    ).items()
    asked_for_nothing = command(fleet, tmp_path, "ingest", bad, "-c", "c")
    (default,) = kept.iterdir()
    assert f"what was not accepted is in {default}" in asked_for_nothing.stdout
    assert default.read_text() == rejects.read_text()
    default.unlink()
    as_json = command(fleet, tmp_path, "ingest", bad, "-c", "c", "--json", "--submission", "a/b")
    (default,) = kept.iterdir()
    assert json.loads(as_json.stdout.splitlines()[-1])["rejects_file"] == str(default)
    found = command(fleet, tmp_path, "search", "number one", "-c", "c", "--json")
    assert json.loads(found.stdout)["results"][0]["id"] == "a"
    assert "number one" in command(fleet, tmp_path, "search", "number one", "-c", "c").stdout

    def counted():
        """None where the search process did not answer within two seconds."""
        told = json.loads(command(fleet, tmp_path, "status", "--json").stdout)
        return told if all(c["stats"] for c in told["collections"]) else None

    status = wait_until(counted)
    assert [m["name"] for m in status["models"]] == ["fake"]
    assert [c["stats"]["documents"] for c in status["collections"]] == [1]
    vectors = tmp_path / "v.npy"
    assert command(fleet, tmp_path, "embed", documents, "--output", "npy", "-o", vectors)
    numpy = module_or_skip("numpy")
    assert numpy.load(vectors).shape == (DOCUMENTS, 32)
    ranked = command(fleet, tmp_path, "rerank", "number 7", documents, "-k", "1", "--json")
    assert json.loads(ranked.stdout)["results"][0]["text"] == "number 7"
    assert command(fleet, tmp_path, "collections", "delete", "c", "--yes").returncode == 0
    assert "no collections" in command(fleet, tmp_path, "collections", "list").stdout


def test_what_is_wrong_is_one_line_and_a_code(redis_url, tmp_path, documents):
    unpublished = command(redis_url, tmp_path, "search", "x", "-c", "c")
    assert unpublished.returncode == 3
    assert "no aggregator has told" in unpublished.stdout
    with connect(redis_url) as client:
        client.set(keys.PUBLISHED, 1)
    for code, words, *arguments in (
        (2, "no such file", "ingest", "missing.jsonl", "-c", "c"),
        (4, "create it first", "ingest", documents, "-c", "c", "--no-create"),
        (4, "no worker has announced", "ingest", documents, "-c", "c"),
        (3, "Redis does not answer", "search", "x", "-c", "c", "--redis", "redis://127.0.0.1:1/0"),
        (4, "no collection", "search", "x", "-c", "c"),
        (2, "may hold", "collections", "create", "../x"),
        (2, "must not be empty", "ingest", "", "-c", "c"),
        (2, "must not be empty", "embed", ""),
        (4, "no worker has announced", "embed", "a long text " * 100),
    ):
        done = command(redis_url, tmp_path, *arguments)
        assert done.returncode == code, done.stdout
        (line,) = done.stdout.splitlines()
        assert line.startswith("vecfleet: ") and words in line
