"""Builds the models and measures the chip: ``python -m vecfleet.bench.gpu_prepare DEVICE``.

A process of its own, so that nothing of it stays on the GPU.
"""

from __future__ import annotations

import asyncio
import platform
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from tokenizers import Tokenizer

from vecfleet.bench.child import answers_apart, serve
from vecfleet.bench.gpu_models import SHAPES, TINY, build
from vecfleet.bench.gpu_texts import END_OF_TEXT, ends_with

_WARM_UPS = 3
_ROUNDS = 3
_ROUND_S = 0.3


class Preparer:
    """What the parent may ask for."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    async def about(self, command: dict[str, Any]) -> dict[str, Any]:
        """Versions of torch and what it runs on."""
        on_gpu = self._device.type == "cuda"
        return {
            "cuda": torch.version.cuda,
            "device_name": torch.cuda.get_device_name(self._device)
            if on_gpu
            else platform.processor() or platform.machine(),
            "capability": list(torch.cuda.get_device_capability(self._device)) if on_gpu else None,
        }

    async def build(self, command: dict[str, Any]) -> dict[str, Any]:
        """Both checkpoints in ``folder``, with the tokenizer saved in ``tokenizer``."""
        folder, tokenizer = Path(command["folder"]), Tokenizer.from_file(command["tokenizer"])
        device = str(self._device)
        places: dict[str, Any] = {}
        for role, shape in SHAPES.items():
            ending = ends_with(tokenizer, END_OF_TEXT) if role == "embedding" else tokenizer
            chosen = TINY if command["tiny"] else shape
            places[role] = str(build(folder, role, ending, chosen, device))
        return places

    async def rate(self, command: dict[str, Any]) -> dict[str, Any]:
        """Operations a second of square bfloat16 products, by their size: the best of rounds."""
        return {str(size): self._rate(size) for size in command["sizes"]}

    def _rate(self, size: int) -> float:
        left, right = (
            torch.randn(size, size, device=self._device).to(torch.bfloat16) for _ in range(2)
        )
        out = torch.empty_like(left)
        for _ in range(_WARM_UPS):
            torch.mm(left, right, out=out)
        once_s = self._time(left, right, out, 1)
        times = max(1, int(_ROUND_S / once_s))
        best_s = min(self._time(left, right, out, times) for _ in range(_ROUNDS)) / times
        return 2.0 * size**3 / best_s

    def _time(
        self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, times: int
    ) -> float:
        self._wait()
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(left, right, out=out)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


async def main(answers: TextIO, device: str) -> None:
    """Serve the parent's commands."""
    preparer = Preparer(device)
    handlers = {"about": preparer.about, "build": preparer.build, "rate": preparer.rate}
    await serve(handlers, answers=answers)


if __name__ == "__main__":
    apart = answers_apart()
    asyncio.run(main(apart, *sys.argv[1:]))
