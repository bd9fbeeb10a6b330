"""What became of a submission's documents: while it runs, and at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Tally:
    """Counts of documents; ``rejected`` never reached the fleet, ``failed`` the fleet refused."""

    committed: int = 0
    unchanged: int = 0
    rejected: int = 0
    failed: int = 0

    @property
    def documents(self) -> int:
        """All that are settled."""
        return self.committed + self.unchanged + self.rejected + self.failed


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a submission is."""

    submission: str
    settled: int  # documents: committed + unchanged + rejected + failed
    committed: int
    unchanged: int
    rejected: int
    failed: int
    in_flight: int  # documents sent and not settled
    seconds: float
    waiting: str  # why nothing moves; "" while it does


@dataclass(frozen=True, slots=True)
class SubmissionResult:
    """How a submission ended. documents = committed + unchanged + rejected + failed."""

    submission: str  # give it to submit() again to go on where it was interrupted
    collection: str
    documents: int
    committed: int  # in the index, by this run or by an earlier one that it continued
    unchanged: int  # stood there already, word for word
    rejected: int  # refused by the producer's checks
    failed: int  # refused by the fleet
    seconds: float
    interrupted: bool = False  # stopped before its end; what was sent is settled

    @property
    def is_complete(self) -> bool:
        """Whether every document is in the collection."""
        return not (self.interrupted or self.rejected or self.failed)

    def to_wire(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)
