"""How many files and connections this process may have open at a time."""

from __future__ import annotations

import resource
from collections.abc import Iterator

_ANY = resource.RLIM_INFINITY
_MANY = 1 << 20  # is tried first where any number should be allowed and is not
_MACOS = 10_240  # its bound, whatever it says


def allow_files(wanted: int | None = None) -> int | None:
    """Have the system allow ``wanted`` files, by default as many as it will at all.

    Never fewer than it does already. Returns how many it does allow; None for any number.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_refused = wanted is not None and hard != _ANY and hard < wanted
    more = hard if wanted is None or is_refused else wanted
    if soft != _ANY and (more == _ANY or soft < more):
        soft = _raised(soft, more, hard)
    return None if soft == _ANY else soft


def _raised(soft: int, more: int, hard: int) -> int:
    """The most that the system allows of ``more``: it may have a bound that it does not tell."""
    for asked in _fewer_and_fewer(more):
        if asked != _ANY and asked <= soft:
            break
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (asked, hard))
        except (OSError, ValueError):
            continue
        return asked
    return soft


def _fewer_and_fewer(most: int) -> Iterator[int]:
    yield most
    begin = _MANY if most == _ANY else most
    halves = {begin >> n for n in range(begin.bit_length())}
    yield from sorted({*halves, min(begin, _MACOS)}, reverse=True)
