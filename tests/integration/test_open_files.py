"""The index's processes open as many files as the system lets them: each collection has some."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import Process

from vecfleet.fleet.process import role_command
from vecfleet.worker import aggregator_main
from vecfleet.worker.aggregator_main import AggregatorConfig, run_aggregator

FEW = 256


@pytest.mark.parametrize("process", ["writer", "search"])
def test_the_processes_of_the_index_may_open_all_files_they_can(
    redis_url: str, tmp_path: Path, run_role: Callable[..., Process], process: str
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, hard))
    try:
        started = run_role(
            *("aggregator", "--only", process, "--redis", redis_url, "--data", str(tmp_path))
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    started.wait_for_line(r"(aggregator|search) ready")
    assert resource.prlimit(started.pid, resource.RLIMIT_NOFILE) == (hard, hard) != (FEW, hard)


def test_where_files_are_short_as_many_may_be_deleted_as_was_asked_for(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made(Exception):
        pass

    told: dict[str, int] = {}

    def aggregator(*_: object, **given: int) -> None:
        told.update(given)
        raise Made

    monkeypatch.setattr(aggregator_main, "Aggregator", aggregator)
    monkeypatch.setattr(aggregator_main, "allow_files", lambda: 320)
    with pytest.raises(Made):
        run_aggregator(AggregatorConfig(redis_url, tmp_path, max_collections=1000))
    assert (told["max_collections"], told["max_deleted"]) == (20, 20_000)


def test_there_are_no_more_collections_than_files_for_them(redis_url: str, tmp_path: Path) -> None:
    writer = role_command(
        *("aggregator", "--only", "writer", "--redis", redis_url, "--data", str(tmp_path))
    )
    limited = ["sh", "-c", 'ulimit -n 320 && exec "$@"', "sh", *writer]
    process = Process(limited, env={"VECFLEET_MAX_COLLECTIONS": "21"})
    try:
        process.wait_for_line("at most 20 collections, not 21")
        process.wait_for_line("aggregator ready")
    finally:
        process.close()
