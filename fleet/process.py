"""Starting children that cannot outlive us, and the command lines of our own roles."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from vecfleet.common.parent_death import dies_with
from vecfleet.common.settings import FAMILY, process_env, process_environment


def role_command(*arguments: str) -> list[str]:
    """The command line of one of our own commands, run by this interpreter."""
    return [sys.executable, "-m", "vecfleet.fleet.cli", *arguments]


def dies_with_parent(sig: signal.Signals = signal.SIGKILL) -> Callable[[], None] | None:
    """A ``preexec_fn`` that has the kernel send ``sig`` when this process dies; None off Linux."""
    return dies_with(os.getpid(), sig)


def marked(environment: Mapping[str, str] | None) -> tuple[dict[str, str], str]:
    """``environment`` (None: ours) for a new child, and the mark in it that its family inherits.

    The mark is the supervisor's process id and a number of its own, after those of the supervisors
    above it. A process may leave its group and session; its first environment it keeps.
    """
    mark = f"{os.getpid()}-{secrets.token_hex(6)}"
    above = process_env(FAMILY)
    base = process_environment() if environment is None else dict(environment)
    return {**base, FAMILY: f"{above}/{mark}" if above else mark}, mark


def family(mark: str) -> Iterator[int]:
    """The processes that live and were started with ``mark``, directly or by one that was.

    Raises ``OSError`` after the last where one could not be looked at, as for want of files.
    """
    prefix = FAMILY.encode() + b"="
    failure: OSError | None = None
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            entries = (folder / "environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended, or is somebody else's
        except OSError as error:
            failure = error
            continue
        for entry in entries:
            if entry.startswith(prefix) and mark.encode() in entry[len(prefix) :].split(b"/"):
                yield int(folder.name)
    if failure is not None:
        raise failure


def kill_family(mark: str) -> bool:
    """Kill what is left of a family; False when nothing is."""
    found = False
    for pid in family(mark):
        found = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return found
