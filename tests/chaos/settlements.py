"""What became of claims, as Redis itself noted it: with the same script that carried it out.

A worker that noted its settlements when it is told of them would forget those whose reply was lost.
So the product's scripts are given one more command, before they are loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

NOTES = "chaos:notes"  # a list; it goes where Redis's data goes
TAKEN_OVER = "taken_over"
MOST_DEATHS = 3  # after so many of its workers died, a document may be buried, whatever is in it
_NOTE = f"redis.call('RPUSH', '{NOTES}', table.concat({{text(now_us), %s}}, ' '))"
_PLANTED = {
    "settle": (
        "    settled[#settled + 1] = 1\n",
        "worker, id, queue, outcome",
    ),
    "rescue": (
        "    unlease(id, execution, queue)\n",
        f"'-', id, queue, '{TAKEN_OVER}'",
    ),
}


@dataclass(frozen=True, slots=True)
class Note:
    """A lease that ended: by a settlement, or because it ran out."""

    at_s: float  # by Redis's clock
    worker: str  # who settled; "-" for a lease that ran out
    job: str
    queue: str
    outcome: str  # settle.lua's, or taken_over


def plant() -> None:
    """Have Redis note what becomes of claims; before the ledger reads its scripts."""
    from vecfleet.worker import ledger

    read = ledger.read_lua

    def noting(directory: Path, *names: str) -> str:
        script = read(directory, *names)
        for name in names:
            if name in _PLANTED:
                script = _with_note(script, *_PLANTED[name])
        return script

    ledger.read_lua = noting


def _with_note(script: str, place: str, what: str) -> str:
    if script.count(place) != 1:
        raise LookupError(f"no script has {place.strip()!r} any more; change the harness too")
    return script.replace(place, f"{place}    {_NOTE % what}\n")


def read(client: redis.Redis) -> Iterator[Note]:
    """All notes, in order."""
    lines: Any = client.lrange(NOTES, 0, -1)
    for line in lines:
        at_us, worker, job, queue, outcome = line.decode().split(" ")
        yield Note(int(at_us) / 1e6, worker, job, queue, outcome)


def settled_twice(notes: list[Note]) -> list[str]:
    """Jobs that were settled more than once at one stage, whichever way; a release settles nothing.

    Jobs that nobody retries by name (searches, the catalogue) are left out, and entries of the dead
    letter, which people may try again.
    """
    counts = Counter(
        (note.job, note.queue)
        for note in notes
        if note.outcome not in ("release", TAKEN_OVER)
        and len(note.job) > 32
        and ".search." not in note.queue
        and "-refused-" not in note.job
    )
    return [
        f"{job} was settled {n} times in {queue}" for (job, queue), n in counts.items() if n > 1
    ]


def worker_deaths(notes: list[Note]) -> Counter[str]:
    """How often each job's worker died or lost its lease."""
    return Counter(note.job for note in notes if note.outcome == TAKEN_OVER)
