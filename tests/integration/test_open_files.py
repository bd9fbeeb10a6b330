"""The index's processes open as many files as the system lets them: each collection has some."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import Process

from vecfleet.fleet.process import role_command

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
