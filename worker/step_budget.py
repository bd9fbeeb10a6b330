"""How many tokens a step may have: half after one ran out of memory, slowly more again."""

from __future__ import annotations

LEAST_TOKENS = 256
CALM_STEPS = 256  # so many steps without trouble, and the next ones may be a quarter larger


class StepBudget:
    """Follows what the memory allows. ``tokens`` is between the least and what it began with."""

    def __init__(self, most: int) -> None:
        self.tokens = most
        self._most = most
        self._calm = 0

    def out_of_memory(self, cost: int) -> None:
        """What cost so many tokens did not fit: later steps are at most half as large."""
        self.tokens = max(min(self.tokens, cost // 2), min(LEAST_TOKENS, self._most))
        self._calm = 0

    def went_well(self) -> None:
        """A step is over and fitted."""
        if self.tokens == self._most:
            return
        self._calm += 1
        if self._calm >= CALM_STEPS:
            self._calm = 0
            self.tokens = min(self._most, self.tokens * 5 // 4)
