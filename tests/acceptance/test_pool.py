"""`vecfleet worker --gpus all` as a person runs it, without a GPU: real processes and signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import Process, children_of, command_of, process_exists, start_role, wait_until

from vecfleet.common import keys
from vecfleet.common.directory import Directory
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.redis_client import connect, connect_async
from vecfleet.fleet.presence import workers_here

READY_S = 90.0
RunRole = Callable[..., Process]


@pytest.fixture
def pool(run_role: RunRole, redis_url: str, tmp_path: Path) -> Callable[..., Process]:
    def start(*arguments: str, **options: Any) -> Process:
        return run_role(
            "--log-format", "json", "worker", "--gpus", "all", "--engine", "fake",
            "--redis", redis_url, *arguments, cwd=tmp_path, **options,
        )  # fmt: skip

    return start


def workers_of(pid: int) -> dict[str, int]:
    """Its workers by model. One that is dead but not yet reaped, or not yet executed, has no
    command line of its own and is left out."""
    workers = {}
    for child in children_of(pid):
        command = command_of(child)
        if "--gpus" not in command and "--model" in command:
            workers[command[command.index("--model") + 1]] = child
    return workers


def messages(process: Process) -> list[str]:
    return [json.loads(ln)["message"] for ln in process.output.splitlines() if ln.startswith("{")]


async def served(redis_url: str) -> dict[str, int]:
    """Models and the workers of their space; all fake ones are of one."""
    client = connect_async(redis_url)
    try:
        models = await Directory(client).models()
        return {model.card.name: len(model.workers) for model in models}
    finally:
        await client.aclose()


def test_both_models_are_served_a_killed_one_comes_back_and_a_stop_drains_both(
    pool: Callable[..., Process], redis_url: str
) -> None:
    process = pool("--model", "A", "--model", "B")
    told = process.wait_for_line("ready after", READY_S)
    assert "A on CPU, B on CPU" in told
    assert any("no GPU here" in message for message in messages(process))
    assert asyncio.run(served(redis_url)) == {"A": 2, "B": 2}

    before = workers_of(process.pid)
    assert sorted(before) == ["A", "B"]
    os.kill(before["A"], signal.SIGKILL)
    process.wait_for_line("killed by SIGKILL")
    after = wait_until(
        lambda: (
            (found := workers_of(process.pid)).keys() == before.keys()
            and set(found.values()) <= workers_here(redis_url).keys()
            and found
        ),
        READY_S,
        "a new worker for A",
    )
    assert after["A"] != before["A"]
    assert after["B"] == before["B"]

    assert process.stop(60) == 0
    said = messages(process)
    assert said[-1] == "stopped"
    assert {"worker-0 drains", "worker-1 drains"} <= set(said)
    assert not [pid for pid in (*before.values(), *after.values()) if process_exists(pid)]
    here = workers_here(redis_url)
    assert not set(after.values()) & here.keys()  # both said goodbye


async def test_it_works_while_it_runs(pool: Callable[..., Process], redis_url: str) -> None:
    process = pool("--model", "A", "--replicas-per-gpu", "2", "--served-name", "N")
    await asyncio.to_thread(process.wait_for_line, "ready after", READY_S)
    assert await served(redis_url) == {"N": 2}
    async with FleetClient(connect_async(redis_url)) as client:
        reply = await client.embed(["one", "two"], model="N")
        assert len(reply.tokens) == 2
    assert await asyncio.to_thread(process.stop, 60) == 0


def test_when_it_is_killed_its_workers_drain(pool: Callable[..., Process], redis_url: str) -> None:
    process = pool("--model", "A", "--model", "B")
    process.wait_for_line("ready after", READY_S)
    pids = children_of(process.pid)
    process.kill()
    for pid in pids:
        wait_until(lambda pid=pid: not process_exists(pid), what="the worker's end")
    assert not set(pids) & workers_here(redis_url).keys()


def test_one_that_never_gets_ready_ends_the_pool(
    pool: Callable[..., Process], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'broken' in sys.orig_argv and '--gpus' not in sys.orig_argv:\n"
        "    raise SystemExit('this one will never start')\n"
    )
    process = pool("--model", "fine", "--model", "broken", env={"PYTHONPATH": str(tmp_path)})
    assert process.wait(READY_S) == 1
    assert "worker-1 failed 5 times in a row while starting" in process.output
    assert "this one will never start" in process.output
    assert process.output.count("starts again in") == 4
    assert "starts again in 4 s" in process.output
    assert "ready after" not in process.output


def test_a_wrong_model_is_told_at_once(redis_url: str, tmp_path: Path) -> None:
    process = start_role(
        "worker", "--gpus", "all", "--engine", "torch", "--redis", redis_url,
        "--model", str(tmp_path / "nothing"),
    )  # fmt: skip
    assert process.wait(READY_S) == 2
    assert "nothing" in process.output


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--gpus", "7", "--model", "A"), "there is no GPU '7' here"),
        (("--model", "A", "--model", "B"), "--gpus all"),
        (("--replicas-per-gpu", "2"), "--gpus all"),
        (("--gpus", "all", "--name", "me"), "--name"),
    ],
)
def test_what_cannot_be_is_refused(
    run_role: RunRole, redis_url: str, arguments: tuple[str, ...], why: str
) -> None:
    process = run_role("worker", "--engine", "fake", "--redis", redis_url, *arguments)
    assert process.wait() == 2
    assert why in process.output


def test_a_check_tells_the_plan_and_starts_nothing(
    pool: Callable[..., Process], redis_url: str
) -> None:
    process = pool("--model", "A", "--model", "B", "--check")
    assert process.wait() == 0
    assert "worker-1: B on CPU" in process.output
    assert "settings and installation are good" in process.output
    with connect(redis_url) as client:
        assert not client.exists(keys.MODELS)
