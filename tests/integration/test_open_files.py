"""The index's processes open as many files as the system lets them: each collection has some."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import Process

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
