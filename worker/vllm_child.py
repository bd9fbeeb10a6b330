"""What runs inside the processes that vLLM's process starts, one for each GPU."""

from __future__ import annotations

from vecfleet.common.parent_death import die_with_starter

# One that hangs in its driver does not notice that the others are gone.
die_with_starter()


class DiesWithParent:
    """Mixed into vLLM's worker; importing it is all that it is for."""
