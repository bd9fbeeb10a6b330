"""Processes that end with the one that started them, by the kernel's hand."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def dies_with(parent: int, sig: signal.Signals = signal.SIGKILL) -> Callable[[], None] | None:
    """A function for a child of ``parent``: the kernel sends it ``sig`` when that dies.

    Made in the parent, it is fit to be called between fork and exec. The kernel watches the thread
    that forked, so fork from one that lives as long as the process. None off Linux.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
        if os.getppid() != parent:  # it died before we asked
            os.kill(os.getpid(), signal.SIGKILL)

    return ask_kernel


def die_with_starter() -> None:
    """Bind this process to the one whose ``multiprocessing`` started it, if there is one."""
    starter = multiprocessing.parent_process()
    if starter is None or starter.pid is None:
        return
    ask_kernel = dies_with(starter.pid)
    if ask_kernel is not None:
        ask_kernel()
