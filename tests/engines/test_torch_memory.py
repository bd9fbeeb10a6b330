"""torch's own out-of-memory error in a step: the work is split, and nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vecfleet.common.errors import EngineFailed
from vecfleet.common.settings import DEFAULT_MODEL
from vecfleet.worker.engine import Priority
from vecfleet.worker.engine_settings import EngineSettings
from vecfleet.worker.engines import load_engine
from vecfleet.worker.torch_model import TorchModel

LIMIT = 120  # tokens that fit at once


@pytest.fixture
async def engine():
    made = await load_engine(EngineSettings(DEFAULT_MODEL, "torch", dtype="float32"))
    yield made
    await made.close()


class Small:
    """Memory for so many tokens a step, on a GPU or a CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.failed = self.ran = self.emptied = 0
        run = TorchModel.run

        def limited(model, payloads):
            if sum(len(payload.ids) for payload in payloads) > LIMIT:
                self.failed += 1
                raise error
            self.ran += 1
            return run(model, payloads)

        def empty() -> None:
            self.emptied += 1

        monkeypatch.setattr(TorchModel, "run", limited)
        monkeypatch.setattr(torch.cuda, "empty_cache", empty)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=["gpu", "cpu"],
)
async def test_the_vectors_are_those_of_a_large_memory(engine, monkeypatch, error):
    texts = [f"sentence number {n} of a few" for n in range(60)]
    expected = await engine.embed(texts, priority=Priority.BULK)
    small = Small(monkeypatch, error)
    found = await engine.embed(texts, priority=Priority.BULK)
    assert np.einsum("nd,nd->n", found.vectors, expected.vectors).min() > 0.9999
    assert small.failed
    assert bool(small.emptied) == isinstance(error, torch.OutOfMemoryError)


async def test_only_a_text_that_is_too_large_alone_is_refused(engine, monkeypatch):
    small = Small(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(EngineFailed) as caught:
        await engine.embed(["one", "many words " * 100, "two"], priority=Priority.BULK)
    assert list(caught.value.indices) == [1]
    assert small.ran
