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


def give_back_freed() -> None:
    """Return to the kernel what was freed, where it is much and will not be needed again."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def prepare_process() -> None:
    """Set allocator and OpenMP; has an effect only before torch is imported."""
    tune_allocator()
    set_process_env("GOMP_SPINCOUNT", str(OPENMP_SPINS))


def prepare_vllm_process(cpu_threads: int | None) -> None:
    """Set what vLLM reads when it is imported; ``cpu_threads`` None: it runs on a GPU.

    By itself its CPU engine ties its threads to cores and leaves one core to the front end; untied,
    they share the cores with the other processes of a one-machine fleet as the kernel sees fit.
    """
    prepare_process()
    if cpu_threads is not None:
        set_process_env("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        set_process_env("OMP_NUM_THREADS", str(cpu_threads))
    set_process_env("VLLM_NO_USAGE_STATS", "1")
    set_process_env("VLLM_LOGGING_LEVEL", "ERROR")
