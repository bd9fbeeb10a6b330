"""One step of a model: a forward pass that is halved where it fails."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from vecfleet.common.logs import shown
from vecfleet.worker.batching import Batcher, Entry
from vecfleet.worker.step_budget import StepBudget
from vecfleet.worker.step_call import StepCall

log = logging.getLogger(__name__)

P = TypeVar("P")


class Runner(Protocol[P]):
    """The model that a loop drives, on the loop's thread only."""

    @property
    def width(self) -> int:
        """Numbers in a row."""
        ...

    def make_batcher(self) -> Batcher[Any, P]:
        """The rule by which the model's texts are packed into steps."""
        ...

    def run(self, payloads: Sequence[P]) -> NDArray[np.float32]:
        """One forward pass: (n, width). May raise anything; NaN marks a text that failed."""
        ...

    def free_memory(self, error: Exception) -> bool:
        """Whether ``error`` says that memory ran out; then what is not needed was given back."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class ForwardPass(Generic[P]):
    """Fills in the rows and failures of the calls whose texts it is given."""

    def __init__(self, runner: Runner[P], batcher: Batcher[StepCall, P]) -> None:
        self._runner = runner
        self._batcher = batcher
        self._budget = StepBudget(batcher.step_tokens)

    @property
    def step_tokens(self) -> int:
        """How many tokens the next step may have."""
        return self._budget.tokens

    def run(self, entries: list[Entry[StepCall, P]], *, tried: bool = False) -> None:
        """One forward pass; where it fails, each half for itself, down to single texts.

        Where memory ran out, later steps are smaller, and a single text is tried once more with
        the memory that was given back.
        """
        found = self._try(entries)
        if not isinstance(found, Exception):
            self._budget.went_well()
            self._take(entries, found)
            return
        no_memory = self._runner.free_memory(found)
        if len(entries) == 1:
            if no_memory and not tried:
                self.run(entries, tried=True)
                return
            log.warning("the model failed on one text: %s", shown(found))
            entries[0].call.failures[entries[0].place] = found
            return
        if no_memory:
            self._budget.out_of_memory(self._batcher.cost(entries))
        log.warning("a step of %d texts failed, halving it: %s", len(entries), shown(found))
        middle = len(entries) // 2
        self.run(entries[:middle])
        self.run(entries[middle:])

    def _try(self, entries: list[Entry[StepCall, P]]) -> NDArray[np.float32] | Exception:
        """The pass's rows or its error, without the frames that would keep its buffers alive."""
        try:
            return self._runner.run([entry.payload for entry in entries])
        except Exception as error:
            error.__context__ = error.__cause__ = None
            return error.with_traceback(None)

    def _take(self, entries: list[Entry[StepCall, P]], values: NDArray[np.float32]) -> None:
        for entry, row in zip(entries, values, strict=True):
            entry.call.rows.values[entry.place] = row
        for place in np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist():
            entry = entries[place]
            entry.call.failures[entry.place] = ArithmeticError("the model returned NaN")
