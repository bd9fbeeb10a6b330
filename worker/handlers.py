"""The allow-list: which functions a worker runs, by name; nothing is ever imported by name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from vecfleet.worker.job import ClaimedJob, Outcome

RunOne = Callable[[ClaimedJob], Awaitable[Outcome]]
RunMany = Callable[[Sequence[ClaimedJob]], Awaitable[Sequence[Outcome]]]


@dataclass(frozen=True, slots=True)
class One:
    """A function that runs job by job; many run at the same time."""

    run: RunOne


@dataclass(frozen=True, slots=True)
class Many:
    """A function that takes all jobs of one claim together and answers in their order."""

    run: RunMany


@dataclass(frozen=True, slots=True)
class Direct:
    """Like ``Many``, run by the thread that claimed, whose lane claims nothing meanwhile.

    For reads of milliseconds: on busy cores each change of threads costs more than they do.
    """

    run: Callable[[Sequence[ClaimedJob]], Sequence[Outcome]]


Handlers = Mapping[str, One | Many | Direct]
