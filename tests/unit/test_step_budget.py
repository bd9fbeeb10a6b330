"""Steps that run out of memory: later ones are smaller, and grow back when it is calm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from vecfleet.common.errors import EngineFailed
from vecfleet.worker.batching import Batcher
from vecfleet.worker.calls import Encoded
from vecfleet.worker.engine import Priority
from vecfleet.worker.step_budget import CALM_STEPS, LEAST_TOKENS, StepBudget
from vecfleet.worker.step_loop import StepLoop


class SmallMemory:
    """A runner with memory for so many texts of 64 tokens."""

    width = 1
    step_tokens = 4096

    def __init__(self, texts: int) -> None:
        self.texts = texts
        self.sizes: list[int] = []
        self.freed = 0
        self.held: list[bool] = []
        self.needs_freed = False  # even for one text, until memory was freed

    def make_batcher(self) -> Batcher[Any, str]:
        return Batcher(self.step_tokens)

    def run(self, payloads: Sequence[str]) -> np.ndarray:
        self.sizes.append(len(payloads))
        if len(payloads) > self.texts or (self.needs_freed and not self.freed):
            raise MemoryError("out of memory")
        return np.full((len(payloads), 1), 1.0, np.float32)

    def free_memory(self, error: Exception) -> bool:
        self.held.append(error.__traceback__ is not None)
        self.freed += isinstance(error, MemoryError)
        return isinstance(error, MemoryError)

    def close(self) -> None:
        pass


def encode(texts: Sequence[str]) -> list[Encoded[str]]:
    return [Encoded(text, 64, False) for text in texts]


async def embed(loop: StepLoop[str], count: int) -> np.ndarray:
    rows = await loop.submit(["x"] * count, encode, priority=Priority.BULK)
    return rows.values


@pytest.fixture
async def loop():
    made = StepLoop[str]("small")
    yield made
    await made.close()


async def test_every_text_is_done_and_the_next_step_is_not_too_large_again(loop):
    runner = SmallMemory(16)
    await loop.start(lambda: runner)
    assert (await embed(loop, 64)).sum() == 64
    assert max(runner.sizes) > 16
    assert not any(runner.held), "the error's frames keep the step's buffers"
    runner.sizes.clear()
    assert (await embed(loop, 64)).sum() == 64
    assert max(runner.sizes) <= 16
    assert runner.sizes == [16] * 4


async def test_a_single_text_is_tried_again_with_the_memory_that_was_freed(loop):
    runner = SmallMemory(16)
    runner.needs_freed = True
    await loop.start(lambda: runner)
    assert (await embed(loop, 1)).sum() == 1
    assert runner.sizes == [1, 1]


async def test_only_a_text_that_fails_alone_is_refused(loop):
    runner = SmallMemory(0)
    await loop.start(lambda: runner)
    with pytest.raises(EngineFailed) as caught:
        await embed(loop, 3)
    assert sorted(caught.value.indices) == [0, 1, 2]
    runner.texts = 16
    assert (await embed(loop, 3)).sum() == 3


def test_the_budget_halves_to_a_floor_and_grows_back():
    budget = StepBudget(4096)
    budget.out_of_memory(3000)
    assert budget.tokens == 1500
    budget.out_of_memory(3000)  # the other half of the same step's parent
    assert budget.tokens == 1500
    for _ in range(9):
        budget.out_of_memory(budget.tokens)
    assert budget.tokens == LEAST_TOKENS
    seen = []
    for _ in range(CALM_STEPS * 20):
        budget.went_well()
        seen.append(budget.tokens)
    assert seen == sorted(seen)
    assert seen[CALM_STEPS - 2] == LEAST_TOKENS
    assert seen[-1] == 4096


def test_a_budget_below_the_floor_stays_what_it_is():
    budget = StepBudget(100)
    budget.out_of_memory(100)
    assert budget.tokens == 100
