"""What a process that holds a model sets before torch is imported: allocator and threads."""

from __future__ import annotations

import ctypes
import platform

from vecfleet.common.settings import set_process_env

# Each forward pass asks for the same large buffers again. glibc gives such buffers back to the
# kernel by default, and taking them anew costs a page fault for every 4 KiB of every pass.
MMAP_THRESHOLD_BYTES = 32 << 20
TRIM_THRESHOLD_BYTES = 512 << 20
TOP_PAD_BYTES = 64 << 20

_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3

# How often an idle OpenMP thread looks for work before it sleeps: some 30 us, enough to bridge the
# gap between two operations. By default it spins for milliseconds, on a core that other processes
# need; where there are more busy threads than cores, a step then took four times as long.
OPENMP_SPINS = 2000


def tune_allocator() -> bool:
    """Make glibc keep what a forward pass frees; False where the C library has no such knobs."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = (
        (_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES),
        (_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES),
        (_M_TOP_PAD, TOP_PAD_BYTES),
    )
    accepted = [mallopt(option, size) == 1 for option, size in settings]
    return all(accepted)


def prepare_process() -> None:
    """Set allocator and OpenMP; has an effect only before torch is imported."""
    tune_allocator()
    set_process_env("GOMP_SPINCOUNT", str(OPENMP_SPINS))
