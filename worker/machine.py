"""What this machine has to run a model on: its GPUs, through NVML, and its memory.

The only module that talks to NVML. It touches no CUDA context, so a process may ask here before a
library that forks, or that reads ``CUDA_VISIBLE_DEVICES`` once, is imported.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vecfleet.common.errors import ConfigError
from vecfleet.common.settings import visible_gpus

_CPU_INFO = Path("/proc/cpuinfo")
_MEMORY_INFO = Path("/proc/meminfo")
_DRIVER_LIBRARY = "libnvidia-ml.so.1"
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or an instance of one that is cut, that this process may use."""

    index: int  # among those visible to this process, as in "cuda:0"
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]  # CUDA's, as (8, 9)

    @property
    def has_bf16(self) -> bool:
        """Whether its matrix units take bfloat16 (Ampere and later)."""
        return self.capability >= (8, 0)

    @property
    def has_fp8(self) -> bool:
        """Whether its matrix units take 8-bit floats (Ada, Hopper and later)."""
        return self.capability >= (8, 9)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan is made for."""

    gpus: tuple[Gpu, ...]
    free_bytes: int  # host memory that can be had without swapping
    cpu_has_bf16: bool  # multiplies bfloat16 itself; emulated, it is slower than float32


def read_machine() -> Machine:
    """What is here now; raises ``ConfigError`` where a driver is there but not NVML."""
    return Machine(read_gpus(), _free_memory(), cpu_has_bf16())


def read_gpus() -> tuple[Gpu, ...]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` leaves to this process, in its order."""
    with nvml() as library:
        if library is None:
            return ()
        wholes = [
            library.nvmlDeviceGetHandleByIndex(index)
            for index in range(library.nvmlDeviceGetCount())
        ]
        parts = [(part, whole) for whole in wholes for part in _parts(library, whole)]
        found = [_read_gpu(library, index, *handles) for index, handles in enumerate(parts)]
    wanted = visible_gpus()
    if wanted is None:
        return tuple(found)
    chosen = []
    for place, name in enumerate(wanted):
        gpu = next((g for g in found if name == str(g.index) or g.uuid.startswith(name)), None)
        if gpu is None:
            break  # as CUDA reads it: what follows an unknown name is not visible either
        chosen.append(
            Gpu(place, gpu.uuid, gpu.name, gpu.total_bytes, gpu.free_bytes, gpu.capability)
        )
    return tuple(chosen)


@contextmanager
def nvml() -> Iterator[Any]:
    """NVML, ready to be asked; None where there is no NVIDIA driver."""
    try:
        ctypes.CDLL(_DRIVER_LIBRARY)
    except OSError:
        yield None
        return
    try:
        import pynvml
    except ImportError:
        raise ConfigError(
            "there is an NVIDIA driver, but not the package that asks it; "
            "get it with: pip install nvidia-ml-py"
        ) from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


class GpuMemory:
    """The memory of one GPU, to be read again and again."""

    def __init__(self, uuid: str) -> None:
        self._held = ExitStack()
        self._library = self._held.enter_context(nvml())
        self._handle = self._library and self._library.nvmlDeviceGetHandleByUUID(uuid)

    def read(self) -> tuple[int, int]:
        """Total and free bytes; (0, 0) where NVML does not say."""
        if self._library is None:
            return 0, 0
        try:
            memory = self._library.nvmlDeviceGetMemoryInfo(self._handle)
        except self._library.NVMLError:
            return 0, 0
        return int(memory.total), int(memory.free)

    def close(self) -> None:
        """Let go of NVML."""
        self._held.close()


def _parts(library: Any, whole: Any) -> list[Any]:
    """The MIG instances of a GPU that is cut into some, else the GPU itself."""
    try:
        is_cut, _ = library.nvmlDeviceGetMigMode(whole)
    except library.NVMLError:  # it knows of no such thing
        is_cut = 0
    if not is_cut:
        return [whole]
    parts = []
    for place in range(library.nvmlDeviceGetMaxMigDeviceCount(whole)):
        try:
            parts.append(library.nvmlDeviceGetMigDeviceHandleByIndex(whole, place))
        except library.NVMLError:  # this place is empty
            continue
    return parts


def _read_gpu(library: Any, index: int, handle: Any, whole: Any) -> Gpu:
    memory = library.nvmlDeviceGetMemoryInfo(handle)
    major, minor = library.nvmlDeviceGetCudaComputeCapability(whole)
    return Gpu(
        index=index,
        uuid=_text(library.nvmlDeviceGetUUID(handle)),
        name=_text(library.nvmlDeviceGetName(handle)),
        total_bytes=int(memory.total),
        free_bytes=int(memory.free),
        capability=(int(major), int(minor)),
    )


def _text(said: str | bytes) -> str:
    return said.decode() if isinstance(said, bytes) else said


def _free_memory() -> int:
    for line in _MEMORY_INFO.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) << 10
    raise ConfigError(f"{_MEMORY_INFO} says nothing of available memory")


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; emulated, it is slower than float32."""
    try:
        flags = set(_CPU_INFO.read_text().split())
    except OSError:
        return False
    return any(flag in flags for flag in _BF16_FLAGS)
