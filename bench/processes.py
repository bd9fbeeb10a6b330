"""CPU time and memory of processes, from /proc; Linux only."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used; ``children`` are those it has ended and those that live."""

    cpu_s: float
    children_cpu_s: float
    anon_bytes: int
    children_anon_bytes: int


def usage(pid: int) -> Usage:
    """The use of a process; raises ``ProcessLookupError`` when it has ended."""
    cpu_s, ended_s = _cpu(pid)
    children_s, children_bytes = ended_s, 0
    for child in _children(pid):
        try:
            theirs = usage(child)
        except ProcessLookupError:
            continue
        children_s += theirs.cpu_s + theirs.children_cpu_s
        children_bytes += theirs.anon_bytes + theirs.children_anon_bytes
    return Usage(cpu_s, children_s, _anon_bytes(pid), children_bytes)


def has_busy_children(pid: int) -> bool:
    """Whether a child of a process computes, waits for the disk or would like to compute."""
    for child in _children(pid):
        try:
            state = _read(child, "stat").rpartition(")")[2].split()[0]
        except ProcessLookupError:
            continue
        if state in "RD":
            return True
    return False


@contextmanager
def children_stopped(pid: int) -> Iterator[None]:
    """Hold all descendants of a process still: vLLM's spin for 8% of a core without any work."""
    stopped = _descendants(pid)
    for child in stopped:
        os.kill(child, signal.SIGSTOP)
    try:
        yield
    finally:
        for child in stopped:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGCONT)


def _descendants(pid: int) -> list[int]:
    found = []
    for child in _children(pid):
        with suppress(ProcessLookupError):
            found += [child, *_descendants(child)]
    return found


def _cpu(pid: int) -> tuple[float, float]:
    # The name in parentheses may hold anything; the numbers begin behind it.
    fields = _read(pid, "stat").rpartition(")")[2].split()
    own, ended = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
    return own / _TICKS_PER_S, ended / _TICKS_PER_S


def _anon_bytes(pid: int) -> int:
    for line in _read(pid, "status").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _children(pid: int) -> list[int]:
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return found
    return found


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
