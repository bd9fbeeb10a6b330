"""Starting children that cannot outlive us, and the command lines of our own roles."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def role_command(*arguments: str) -> list[str]:
    """The command line of one of our own commands, run by this interpreter."""
    return [sys.executable, "-m", "vecfleet.fleet.cli", *arguments]


def dies_with_parent(sig: signal.Signals = signal.SIGKILL) -> Callable[[], None] | None:
    """A ``preexec_fn`` that has the kernel send ``sig`` when the parent dies; None off Linux.

    The kernel watches the thread that forked, so fork from one that lives as long as the process.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def between_fork_and_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os.kill(os.getpid(), signal.SIGKILL)

    return between_fork_and_exec
