"""How much may wait."""

from __future__ import annotations

from dataclasses import dataclass

JOB_BYTES = 1500  # what Redis pays for a job beside its data; counted with it wherever it waits


@dataclass(frozen=True, slots=True)
class Admission:
    """How much may wait in one queue, in the merge queue behind it, and for how long.

    The limits of all tenants together bound what one may hold by what is left: one alone gets
    half of it, two a third each, and there is always something left for the next.
    """

    max_tokens: int = 4_000_000
    max_bytes: int = 256 << 20
    max_merge_bytes: int = 512 << 20
    max_shared_bytes: int = 1 << 30  # in the queues of all tenants for a model and a lane
    max_unmerged_bytes: int = 2 << 30  # in all merge queues
    max_dead_bytes: int = 512 << 20  # in the dead letters of all tenants
    max_submissions: int = 200_000  # of one tenant that Redis remembers
    max_wait_s: float = 10.0  # of an interactive call, by what the workers say they do

    def most_bytes(self, lines: int) -> int:
        """What all of it lets wait and lie in Redis, with so many lines: model, task and lane."""
        return lines * self.max_shared_bytes + self.max_unmerged_bytes + self.max_dead_bytes
