"""How many files and connections this process may have open at a time."""

from __future__ import annotations

import resource
from contextlib import suppress

_ANY = resource.RLIM_INFINITY


def allow_files(wanted: int | None = None) -> int | None:
    """Have the system allow ``wanted`` files, by default as many as it will at all.

    Never fewer than it does already. Returns how many it does allow; None for any number.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_refused = wanted is not None and hard != _ANY and hard < wanted
    more = hard if wanted is None or is_refused else wanted
    if soft != _ANY and (more == _ANY or soft < more):
        with suppress(OSError, ValueError):  # the system has a bound of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    return None if soft == _ANY else soft
