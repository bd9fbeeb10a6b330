"""How much may wait."""

from __future__ import annotations

from dataclasses import dataclass

JOB_BYTES = 1500  # what Redis pays for a job beside its data; counted with it wherever it waits


@dataclass(frozen=True, slots=True)
class Admission:
    """How much may wait in one queue, in the merge queue behind it, and for how long.

    The limits of all tenants together bound what one may hold by what is left: one alone gets
    half of it, two a third each, and there is always something left for the next. What lies in the
    dead letters goes by half of their limit, and by shares that others cannot take.
    """

    max_tokens: int = 4_000_000
    max_bytes: int = 256 << 20
    max_merge_bytes: int = 512 << 20
    max_shared_bytes: int = 1 << 30  # in the queues of all tenants for a model and a lane
    max_unmerged_bytes: int = 2 << 30  # in all merge queues
    max_dead_bytes: int = 512 << 20  # in the dead letters of all tenants
    max_submissions: int = 200_000  # of one tenant that Redis remembers
    max_wait_s: float = 10.0  # of an interactive call, by what the workers say they do

    def dead_share_bytes(self, held: int, tenants: int) -> float:
        """What a tenant may have in the dead letter, where ``tenants`` have ``held`` bytes in all.

        Past that nothing that may end there is admitted. One half of the limit goes by what is left
        of it; the other holds a share that what others have does not touch. Together they never
        pass the limit, but for what each was admitted before it came to its share: of the tenants
        that are there, the n-th to come grew when there were n or more. Beyond the first half the
        shares for 2, 3, ... tenants sum to 3/8, and the first's, once it is not alone, is 1/8.
        """
        tenants = max(1, tenants)
        own = 3 * self.max_dead_bytes / (4 * tenants * (tenants + 1))
        return max(own, self.max_dead_bytes / 2 - held)

    def most_bytes(self, lines: int) -> int:
        """What all of it lets wait and lie in Redis, with so many lines: model, task and lane."""
        return lines * self.max_shared_bytes + self.max_unmerged_bytes + self.max_dead_bytes
