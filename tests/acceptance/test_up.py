"""`vecfleet up` as a person runs it: real processes, real signals, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import RedisError
from servers import Process, children_of, command_of, process_exists, wait_until

from vecfleet.common.redis_client import connect
from vecfleet.fleet.redis_server import free_port

READY_S = 90.0
ROLES = ("redis", "search", "writer", "worker", "gateway")
RunRole = Callable[..., Process]


class Up:
    """A running fleet and what it said."""

    def __init__(self, process: Process, data: Path, port: int) -> None:
        self.process = process
        self.data = data
        self.url = f"http://127.0.0.1:{port}"

    def ready(self) -> Up:
        self.process.wait_for_line("ready at ", READY_S)
        return self

    def messages(self) -> list[dict[str, Any]]:
        lines = self.process.output.splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def children(self) -> dict[str, int]:
        """Pids by role, as the kernel sees our children's command lines."""
        found: dict[str, int] = {}
        for pid in children_of(self.process.pid):
            command = command_of(pid)
            if "redis-server" in command[0]:
                found["redis"] = pid
            for role in ("search", "writer", "worker", "gateway"):
                if role in command:
                    found[role] = pid
        return found

    def redis_url(self) -> str:
        return str(json.loads((self.data / "fleet.json").read_text())["redis_url"])


def call(method: str, url: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        url,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


@pytest.fixture
def up(run_role: RunRole, tmp_path: Path) -> Callable[..., Up]:
    def start(*arguments: str, data: Path | None = None, engine: str = "null") -> Up:
        folder, port = data or tmp_path / "data", free_port()
        process = run_role(
            "--log-format", "json", "up", "--data", str(folder), "--port", str(port),
            "--engine", engine, *arguments,
        )  # fmt: skip
        return Up(process, folder, port)

    return start


def test_it_serves_and_a_stop_drains_it_in_order(up: Callable[..., Up]) -> None:
    fleet = up().ready()
    pids = fleet.children()
    assert set(pids) == set(ROLES)
    answer = call("POST", f"{fleet.url}/v1/embeddings", {"input": "a question"})
    assert len(answer["data"]) == 1

    assert fleet.process.stop(60) == 0
    said = [m["message"] for m in fleet.messages() if m["process"] == "fleet"]
    drains = [f"{role} drains" for role in reversed(ROLES)]
    assert [message for message in said if message in drains] == drains
    assert not [pid for pid in pids.values() if process_exists(pid)]


def test_its_redis_is_bounded_and_mended_before_it_starts(up: Callable[..., Up]) -> None:
    fleet = up().ready()
    with connect(fleet.redis_url()) as client:
        most = int(client.config_get("maxmemory")["maxmemory"])
        # Four lanes of 1 GiB, 2 of merging and half a one of the dead letter, and half again.
        assert 1 << 30 <= most <= 39 << 28
        client.eval("redis.call('SET', 'a', '1') redis.call('SET', 'b', '2')", 0)
    redis = fleet.children()["redis"]
    os.kill(redis, signal.SIGSTOP)
    data = fleet.data / "redis"
    file = next(iter(data.glob("appendonlydir/*.incr.aof")), data / "appendonly.aof")
    with file.open("ab") as grown:
        grown.write(b"*1\r\n$5\r\nMULTI\r\n*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\n3\r\n")
    os.kill(redis, signal.SIGKILL)
    fleet.process.wait_for_line("half a transaction")

    def again() -> bool:
        try:
            with connect(fleet.redis_url()) as client:
                return bool(client.get("a") == b"1")
        except RedisError:
            return False

    wait_until(again, 30, "Redis with what it held")
    assert fleet.process.stop(60) == 0


def test_what_was_ingested_is_found_after_a_restart(up: Callable[..., Up]) -> None:
    fleet = up().ready()
    call("PUT", f"{fleet.url}/collections/notes", {})
    documents = [{"id": f"d{n}", "text": f"the note number {n}"} for n in range(50)]
    told = call("POST", f"{fleet.url}/collections/notes/documents", {"documents": documents})
    submission = told.get("submission_id") or told["id"]
    wait_until(
        lambda: call("GET", f"{fleet.url}/submissions/{submission}")["state"] == "done",
        what="the submission's end",
    )
    assert fleet.process.stop(60) == 0

    again = up(data=fleet.data).ready()
    found = call("GET", f"{again.url}/collections/notes/documents/d7")
    assert found["text"] == "the note number 7"
    assert again.process.stop(60) == 0


@pytest.mark.parametrize("role", ROLES)
def test_a_killed_child_is_replaced(up: Callable[..., Up], role: str) -> None:
    fleet = up().ready()
    before = fleet.children()
    os.kill(before[role], signal.SIGKILL)
    fleet.process.wait_for_line("killed by SIGKILL")
    wait_until(
        lambda: fleet.children().get(role, before[role]) != before[role], what=f"a new {role}"
    )

    def serves() -> bool:
        try:
            call("POST", f"{fleet.url}/v1/embeddings", {"input": "still there?"})
        except OSError:  # also HTTP's 5xx
            return False
        return True

    wait_until(serves, 60, "an answer")
    assert fleet.process.stop(60) == 0


def test_when_it_is_killed_no_process_stays(up: Callable[..., Up]) -> None:
    fleet = up().ready()
    pids = fleet.children()
    fleet.process.kill()
    for role, pid in pids.items():
        wait_until(lambda pid=pid: not process_exists(pid), what=f"the end of {role}")
    again = up(data=fleet.data).ready()  # and nothing keeps the next one from starting
    assert again.process.stop(60) == 0


def test_a_second_one_on_the_same_data_is_refused(up: Callable[..., Up]) -> None:
    fleet = up().ready()
    second = up(data=fleet.data)
    assert second.process.wait() == 2
    assert f"(process {fleet.process.pid})" in second.process.output
    assert "--data" in second.process.output
    assert fleet.process.stop(60) == 0


def test_a_port_in_use_is_named(run_role: RunRole, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = run_role("up", "--data", str(tmp_path / "data"), "--port", str(port))
        assert process.wait() == 2
    assert f"port {port}" in process.output
    assert "--port" in process.output


def test_a_model_that_is_not_there_ends_the_start(up: Callable[..., Up], tmp_path: Path) -> None:
    fleet = up("--model", str(tmp_path / "no-such-model"), engine="torch")
    assert fleet.process.wait(READY_S) == 2
    assert "no-such-model" in fleet.process.output
    assert not (fleet.data / "fleet.json").exists()


def test_nothing_is_left_but_the_data_folder(up: Callable[..., Up], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    fleet = up().ready()
    with connect(fleet.redis_url()) as client:
        assert client.ping()
    assert fleet.process.stop(60) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "elsewhere"]
    assert not (fleet.data / "fleet.json").exists()
    assert not (fleet.data / "redis" / "redis.sock").exists()


def test_a_second_signal_ends_it_at_once(up: Callable[..., Up]) -> None:
    fleet = up().ready()
    pids = fleet.children()
    os.kill(pids["worker"], signal.SIGSTOP)  # it will not drain
    fleet.process.signal(signal.SIGINT)
    fleet.process.wait_for_line("worker drains")
    fleet.process.signal(signal.SIGINT)
    fleet.process.wait(30)
    assert not [pid for pid in pids.values() if process_exists(pid)]
