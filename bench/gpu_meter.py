"""What a GPU does while something is measured, through NVML."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from vecfleet.bench.stats import median
from vecfleet.worker.machine import Gpu, nvml

_PERIOD_S = 0.05
_EDGE_S = (
    1.0  # NVML tells of the last second at most: the edges of a run tell of what was beside it
)


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float  # of time.monotonic
    busy: float  # share of the time with a kernel on the GPU, 0 to 1
    watts: float
    sm_mhz: int
    used_bytes: int


class GpuMeter:
    """Samples one GPU in a thread while its context lasts; without a GPU it sees nothing."""

    def __init__(self, gpu: Gpu | None) -> None:
        self._gpu = gpu
        self._samples: list[_Sample] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-meter", daemon=True)

    def __enter__(self) -> Self:
        if self._gpu is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._gpu is not None:
            self._thread.join()

    @property
    def sees(self) -> bool:
        """Whether there is a GPU that tells how busy it is."""
        return bool(self._samples)

    def between(self, began: float, ended: float) -> dict[str, float]:
        """Means over a run, its first and last second left out where it was long enough.

        Times are those of ``time.monotonic``. Empty without samples.
        """
        edge = _EDGE_S if ended - began >= 4 * _EDGE_S else 0.0
        seen = [s for s in self._samples if began + edge <= s.at <= ended - edge]
        if not seen:
            return {}
        return {
            "busy": sum(sample.busy for sample in seen) / len(seen),
            "watts": round(sum(sample.watts for sample in seen) / len(seen)),
            "sm_mhz": median(sample.sm_mhz for sample in seen),
            "used_gib": round(max(sample.used_bytes for sample in seen) / 2**30, 1),
            "samples": len(seen),
        }

    def _run(self) -> None:
        assert self._gpu is not None
        with nvml() as library:
            if library is None:
                return
            handle = library.nvmlDeviceGetHandleByUUID(self._gpu.uuid)
            while not self._done.wait(_PERIOD_S):
                with suppress(library.NVMLError):  # some machines keep a figure to themselves
                    self._samples.append(_read(library, handle))


def _read(library: Any, handle: Any) -> _Sample:
    watts, sm_mhz = 0.0, 0
    with suppress(library.NVMLError):
        watts = library.nvmlDeviceGetPowerUsage(handle) / 1000
        sm_mhz = library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM)
    return _Sample(
        time.monotonic(),
        library.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        watts,
        sm_mhz,
        int(library.nvmlDeviceGetMemoryInfo(handle).used),
    )
