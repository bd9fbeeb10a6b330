"""A power cut, played: SIGKILL leaves what was written, so the last second is cut off as well.

With ``everysec`` Redis writes at once and flushes each second. What a power cut takes away is what
was written and not flushed: nobody sees that from outside, so the file's size is noted over time,
and all goes that was written in the last second before the death.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from chaos.client_ledger import Note, read_notes

from vecfleet.common import keys
from vecfleet.fleet.redis_server import RedisServer

LOST_S = 1.0
MOST_LOST_S = 2.0
"""Redis flushes once a second, and waits up to a second more for a flush that is still under way.
So "the last second" may be two: nobody promises less. The cut itself takes one."""
_LOOK_S = 0.02
_HELD_UP_S = 0.2  # between two looks
_KEPT_S = 10.0


@dataclass(frozen=True, slots=True)
class Lost:
    """A submission that was acknowledged with a 202, and that Redis then did not know."""

    client: str
    number: int  # of the client's operation
    submission: str
    age_s: float  # of its 202 when Redis died
    was_done: bool  # the client was told that all of it is in the index: that stays


@dataclass(frozen=True, slots=True)
class PowerCut:
    """A restart of a Redis that may lose what it had."""

    at_s: float  # when Redis died
    lost: tuple[Lost, ...]


class Growth:
    """Notes how large the append-only file is, in a thread of its own."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._sizes: deque[tuple[float, Path, int]] = deque()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="growth", daemon=True)

    def start(self) -> Growth:
        """Begin to look."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Look no longer."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_LOOK_S):
            with contextlib.suppress(OSError, ValueError):
                path = append_only_file(self._server)
                now = time.monotonic()
                self._sizes.append((now, path, path.stat().st_size))
                while self._sizes[0][0] < now - _KEPT_S:
                    self._sizes.popleft()

    def look_at(self, when_s: float, path: Path) -> tuple[float, int] | None:
        """The last look before that moment: when it was, and how large the file was.

        Who was held up did not look just before it: then the next look, as what was written earlier
        had been flushed. 0.0 and the first size where we had not begun; None where we did not look.
        """
        sizes = [(at, size) for at, of, size in list(self._sizes) if of == path]
        before = [look for look in sizes if look[0] <= when_s]
        after = [look for look in sizes if look[0] > when_s]
        if before and when_s - before[-1][0] <= _HELD_UP_S:
            return before[-1]
        if before:
            return after[0] if after else None
        return (0.0, after[0][1]) if after else None  # what was there then was flushed

    def cut_off_the_last_second(self, died_s: float) -> int:
        """Take away what was written in the second before Redis died; how many bytes that was.

        The cut goes through whatever stands there: a command, or a transaction.
        """
        path = append_only_file(self._server)
        size = path.stat().st_size
        looked_s, kept = self.look_at(died_s - LOST_S, path) or (0.0, size)
        if looked_s:
            # One byte less: it ends within a command, as a page of a disk does.
            kept = max(0, kept - 1)
        kept = min(kept, size)  # a start mends the end of its file
        with path.open("r+b") as file:
            file.truncate(kept)
        # What it was before is no size of this file any more.
        self._sizes = deque([(time.monotonic(), path, kept)])
        return size - kept


def append_only_file(server: RedisServer) -> Path:
    """The file that grows: of Redis 6.2, or the last increment of Redis 7."""
    single = server.data_dir / "appendonly.aof"
    increments = sorted(
        (server.data_dir / "appendonlydir").glob("*.incr.aof"),
        key=lambda path: int(path.name.split(".")[-3]),
    )
    return increments[-1] if increments else single


def power_cut(client: redis.Redis, ledgers: Sequence[Path], died_s: float) -> PowerCut:
    """What of all that was accepted Redis does not know any more; before anybody mends it."""
    lost = []
    for path in ledgers:
        done: set[str] = set()
        accepted: dict[str, Note] = {}
        for note in read_notes(path, "accepted", "lost", "done", "deleting"):
            if note.what == "deleting":  # what an earlier life was told, this one asks for again
                accepted = {id: told for id, told in accepted.items() if told.number != note.number}
                continue
            submission = note.fields["submission"]
            if note.what == "accepted":
                accepted[submission] = note
            elif note.what == "done":
                done.add(submission)
            else:  # a deletion is sent again as another submission
                accepted.pop(submission, None)
        for submission, note in accepted.items():
            state: Any = client.hget(keys.submission(submission), "state")
            if note.at_s < died_s and state in (None, b"open"):  # accepted means closed
                age_s = died_s - note.at_s
                was_done = submission in done
                lost.append(Lost(path.stem, note.number, submission, age_s, was_done))
    return PowerCut(died_s, tuple(lost))


def complaints(cuts: Sequence[PowerCut], ledgers: Sequence[Path], *, everysec: bool) -> list[str]:
    """What was lost that had been acknowledged for too long, and what nobody noticed."""
    told: dict[str, float] = {}
    for path in ledgers:
        # A client that died sends it again anyway; and "done" may have been on its way.
        for note in read_notes(path, "lost", "accepted", "done"):
            told[note.fields["submission"]] = note.at_s
    wrong = []
    seen: set[tuple[str, float]] = set()
    for cut in cuts:
        for lost in cut.lost:
            # What an earlier cut took, and nobody has sent again since, is not lost once more.
            acknowledgement = (lost.submission, round(cut.at_s - lost.age_s, 3))
            if acknowledgement in seen:
                continue
            seen.add(acknowledgement)
            name = f"{lost.client}-{lost.number}, accepted {lost.age_s:.2f} s before Redis died,"
            if everysec and not lost.was_done and lost.age_s > MOST_LOST_S:
                wrong.append(f"{name} was lost")
            if not lost.was_done and told.get(lost.submission, 0.0) < cut.at_s:
                wrong.append(f"{name} was lost, and nobody noticed")
    return wrong


def noticed(cuts: Sequence[PowerCut], ledgers: Sequence[Path]) -> int:
    """How many losses clients were told of after the first cut."""
    first = min((cut.at_s for cut in cuts), default=0.0)
    return sum(note.at_s > first for path in ledgers for note in read_notes(path, "lost"))
