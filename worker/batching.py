"""Which texts the next forward pass takes: token budgets, two priorities, no torch.

Bulk is taken in generations: when one is used up, the older half of what waits becomes the next,
sorted by length, so that a pass holds texts of like length.  The younger half stays behind: its
calls finish later, so the engine has work while their callers fetch more.  Generations run
alternately from short to long and from long to short: the end of one has the lengths that the next
begins with, so no pass is left half empty in between.

Interactive calls run before bulk at every boundary between passes.  Each of their tokens grants
bulk a ninth of a token of credit, and bulk runs when its credit covers its next pass, so it keeps
at least a tenth of the tokens.
"""

from __future__ import annotations

import heapq
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from vecfleet.worker.engine import Priority

LENGTH_MULTIPLE = 16  # lengths that the kernels of a CPU like
BULK_CREDIT_PER_TOKEN = 1 / 9
MIN_GENERATION_STEPS = 8
MAX_GENERATION_STEPS = 32

C = TypeVar("C")
P = TypeVar("P")


@dataclass(slots=True, eq=False)
class Entry(Generic[C, P]):
    """One text of a call."""

    call: C
    place: int  # in its call
    length: int  # tokens
    payload: P


@dataclass(frozen=True, slots=True)
class Batch(Generic[C, P]):
    """What one forward pass takes, by rising length."""

    priority: Priority
    entries: list[Entry[C, P]]
    tokens: int


def rounded(length: int) -> int:
    """``length`` up to the next multiple of ``LENGTH_MULTIPLE``."""
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def packed_cost(rows: int, tokens: int, longest: int) -> int:
    """Tokens computed where texts lie one after the other without padding."""
    return tokens


def padded_cost(rows: int, tokens: int, longest: int) -> int:
    """Tokens computed where every row is as long as the longest."""
    return rows * rounded(longest)


CostRule = Callable[[int, int, int], int]


@dataclass(slots=True, order=True)
class _Waiting(Generic[C, P]):
    """Entries that arrived together; ordered by when they should be done."""

    due: int
    number: int
    entries: list[Entry[C, P]] = field(compare=False)  # the next one is the last


class _Filler(Generic[C, P]):
    """A batch that grows until its cost would pass the budget."""

    def __init__(self, budget: int, cost: CostRule, most_texts: int) -> None:
        self.entries: list[Entry[C, P]] = []
        self.tokens = 0
        self._longest = 0
        self._budget = budget
        self._cost = cost
        self._most_texts = most_texts

    def fill_from(self, stack: list[Entry[C, P]]) -> bool:
        """Move entries from the end of ``stack``; True when the next one does not fit.

        A batch takes its first entry whatever it costs.
        """
        while stack:
            entry = stack[-1]
            tokens = self.tokens + entry.length
            longest = max(self._longest, entry.length)
            texts = len(self.entries) + 1
            if self.entries and (
                texts > self._most_texts or self._cost(texts, tokens, longest) > self._budget
            ):
                return True
            self.entries.append(stack.pop())
            self.tokens, self._longest = tokens, longest
        return False

    def batch(self, priority: Priority) -> Batch[C, P]:
        self.entries.sort(key=_length)
        return Batch(priority, self.entries, self.tokens)


class Batcher(Generic[C, P]):
    """Texts that wait, and the rule that says which go next. Not thread-safe."""

    def __init__(
        self, step_tokens: int, cost: CostRule = packed_cost, *, step_texts: int | None = None
    ) -> None:
        """``step_tokens`` is the most that ``cost`` may come to in one batch of several texts.

        It may be changed between two batches.
        """
        self.step_tokens = step_tokens
        self.step_texts = step_texts or sys.maxsize
        self._cost = cost
        self._interactive: list[_Waiting[C, P]] = []  # a heap
        self._bulk: deque[_Waiting[C, P]] = deque()
        self._generation: list[Entry[C, P]] = []  # the next one is the last
        self._rising = False
        self._number = 0
        self._clock = 0  # interactive tokens run so far
        self._credit = 0.0  # bulk tokens that may run although interactive ones wait
        self._bulk_tokens = 0
        self._interactive_tokens = 0

    @property
    def pending_tokens(self) -> int:
        """Tokens that wait."""
        return self._bulk_tokens + self._interactive_tokens

    def cost(self, entries: Sequence[Entry[C, P]]) -> int:
        """What a step of ``entries`` comes to by this batcher's rule."""
        lengths = [entry.length for entry in entries]
        return self._cost(len(lengths), sum(lengths), max(lengths, default=0))

    def add(self, priority: Priority, entries: Sequence[Entry[C, P]]) -> None:
        """Let ``entries``, all of one call, wait."""
        if not entries:
            return
        tokens = sum(entry.length for entry in entries)
        self._number += 1
        if priority is Priority.BULK:
            self._bulk_tokens += tokens
            self._bulk.append(_Waiting(0, self._number, list(entries)))
            return
        self._interactive_tokens += tokens
        # A small call passes a large one that came shortly before it. The clock runs on while the
        # large one waits, so that those which come later do not pass it for ever.
        by_length = sorted(entries, key=_length, reverse=True)
        heapq.heappush(self._interactive, _Waiting(self._clock + tokens, self._number, by_length))

    def drop(self, call: C) -> int:
        """Forget the entries of ``call`` that wait; returns their tokens."""
        dropped_bulk = 0
        for waiting in self._bulk:
            dropped_bulk += _drop(waiting.entries, call)
        dropped_bulk += _drop(self._generation, call)
        self._bulk = deque(waiting for waiting in self._bulk if waiting.entries)
        dropped_interactive = sum(_drop(waiting.entries, call) for waiting in self._interactive)
        self._interactive = [waiting for waiting in self._interactive if waiting.entries]
        heapq.heapify(self._interactive)
        self._bulk_tokens -= dropped_bulk
        self._interactive_tokens -= dropped_interactive
        return dropped_bulk + dropped_interactive

    def next_batch(self) -> Batch[C, P] | None:
        """Take the next batch; None when nothing waits."""
        if not self._bulk_tokens:
            self._credit = 0.0
        if self._interactive and not self._bulk_has_credit():
            batch = self._take_interactive()
            self._clock += batch.tokens
            if self._bulk_tokens:
                self._credit += batch.tokens * BULK_CREDIT_PER_TOKEN
            return batch
        if self._bulk_tokens:
            batch = self._take_bulk()
            self._credit = max(0.0, self._credit - batch.tokens)
            return batch
        return None

    def _bulk_has_credit(self) -> bool:
        if not self._bulk_tokens:
            return False
        if not self._generation:
            self._begin_generation()
        next_tokens = max(self._generation[-1].length, min(self.step_tokens, self._bulk_tokens))
        return self._credit >= next_tokens

    def _take_interactive(self) -> Batch[C, P]:
        filler = _Filler[C, P](self.step_tokens, self._cost, self.step_texts)
        while self._interactive:
            full = filler.fill_from(self._interactive[0].entries)
            if not self._interactive[0].entries:
                heapq.heappop(self._interactive)
            if full:
                break
        self._interactive_tokens -= filler.tokens
        return filler.batch(Priority.INTERACTIVE)

    def _take_bulk(self) -> Batch[C, P]:
        filler = _Filler[C, P](self.step_tokens, self._cost, self.step_texts)
        while not filler.fill_from(self._generation) and self._bulk:
            self._begin_generation()
        self._bulk_tokens -= filler.tokens
        return filler.batch(Priority.BULK)

    def _begin_generation(self) -> None:
        """Make the older half of what waits the next generation; the last one is used up."""
        least = MIN_GENERATION_STEPS * self.step_tokens
        most = MAX_GENERATION_STEPS * self.step_tokens
        wanted = min(max(self._bulk_tokens // 2, least), most)
        taken = 0
        while self._bulk and taken < wanted:
            entries = self._bulk.popleft().entries
            taken += sum(entry.length for entry in entries)
            self._generation += entries
        self._rising = not self._rising
        self._generation.sort(key=_length, reverse=self._rising)


def _length(entry: Entry[C, P]) -> int:
    return entry.length


def _drop(entries: list[Entry[C, P]], call: C) -> int:
    """Remove the entries of ``call`` in place; returns their tokens."""
    kept = [entry for entry in entries if entry.call is not call]
    tokens = sum(entry.length for entry in entries) - sum(entry.length for entry in kept)
    if len(kept) != len(entries):
        entries[:] = kept
    return tokens
