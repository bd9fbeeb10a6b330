"""The quarantine: a job whose worker died runs alone, one text at a time, each noted beforehand.

Which text killed is known only if nothing else was in the engine, and only from a note that
outlives the process. So a suspect waits until nothing else is in flight in its worker; then each of
its texts is noted in Redis (mark.lua) and computed. What dies then is judged by rescue.lua. Between
texts, interactive jobs that wait are let in for a moment; nothing is noted meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Container,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

from vecfleet.common import codec, keys
from vecfleet.common.errors import (
    EngineFailed,
    InvalidInput,
    PoisonText,
    QueueFull,
    RedisUnavailable,
    TextsTooLong,
    VecfleetError,
)
from vecfleet.common.hashing import text_key
from vecfleet.common.limits import estimate_tokens
from vecfleet.worker.job import ClaimedJob, Failure, Refused
from vecfleet.worker.ledger import Ledger
from vecfleet.worker.poison import PoisonTexts
from vecfleet.worker.window import Window

log = logging.getLogger(__name__)

TURN_S = 0.1  # so long a suspect keeps interactive jobs waiting, or for one text
_VISIT_S = 0.05  # so long they may come in
_LOOK_S = 0.002
_RETRY_S = 0.2

T = TypeVar("T")


class Quarantine:
    """The suspects of one worker, and who may claim while they run."""

    def __init__(
        self,
        ledger: Ledger,
        windows: Mapping[keys.Lane, Window],
        *,
        urgent: Callable[[], Sequence[keys.QueueName]] = lambda: (),
    ) -> None:
        """``urgent`` names the queues whose jobs are let in between two texts of a suspect."""
        self.poison = PoisonTexts(ledger)
        self._ledger = ledger
        self._windows = windows
        self._urgent = urgent
        self._changed = threading.Condition()
        self._suspects: dict[str, keys.Lane] = {}  # by execution
        self._is_open = False  # for interactive jobs, beside a suspect
        self._claims: dict[keys.Lane, int] = dict.fromkeys(windows, 0)
        self._turn = asyncio.Lock()
        self._in_line = 0  # suspects that wait for it
        self._notes = ThreadPoolExecutor(1, thread_name_prefix="quarantine")

    # The threads that claim

    @contextmanager
    def claiming(self, lane: keys.Lane, timeout_s: float) -> Iterator[bool]:
        """Whether ``lane`` may claim now, after waiting at most ``timeout_s`` for it."""
        with self._changed:
            may = self._changed.wait_for(lambda: self._may_claim(lane), timeout_s)
            self._claims[lane] += may
        try:
            yield may
        finally:
            with self._changed:
                self._claims[lane] -= may

    def _may_claim(self, lane: keys.Lane) -> bool:
        return not self._suspects or (self._is_open and lane == "interactive")

    def take(self, jobs: Sequence[ClaimedJob]) -> None:
        """Claimed: those that are suspects keep others out until ``give_back``."""
        with self._changed:
            self._suspects |= {job.execution: job.queue.lane for job in jobs if job.is_suspect}

    def give_back(self, job: ClaimedJob) -> None:
        """It is not in flight any more."""
        with self._changed:
            self._suspects.pop(job.execution, None)
            if not self._suspects:
                self._is_open = False
            self._changed.notify_all()

    # The loop

    async def one_by_one(
        self,
        job: ClaimedJob,
        count: int,
        run: Callable[[int], Awaitable[T]],
        *,
        texts: Sequence[Sequence[str]] = (),
    ) -> list[T | EngineFailed | InvalidInput]:
        """What ``run`` makes of each text of a suspect, or the error that is this text's own.

        ``texts``: each with what is computed together with it, to be remembered when it kills. The
        text at which its last worker died comes first, as nothing should hide its death. One that
        is condemned is not run. Raises what is no text's fault.
        """
        digests = [text_key(*parts) for parts in texts] or [""] * count
        told: list[T | EngineFailed | InvalidInput] = [
            PoisonText(indices=[place]) for place in range(count)
        ]
        left = [place for place in range(count) if place not in job.condemned]
        left.sort(key=lambda place: place != job.named)
        left.reverse()  # the next one stands last
        visit_s = 0.0
        while left:
            await self._note(job, None)
            async with self._my_turn():
                await self._be_alone(visit_s)
                await self._run_some(job, left, digests, run, told)
            visit_s = _VISIT_S
        await self._note(job, "*")  # what dies from now on has not died of a text
        return told

    @asynccontextmanager
    async def _my_turn(self) -> AsyncIterator[None]:
        """Suspects run by turns, so that a query's does not wait for the whole of a block's."""
        self._in_line += 1
        try:
            await self._turn.acquire()
        finally:
            self._in_line -= 1
        try:
            yield
        finally:
            self._turn.release()

    async def _run_some(
        self,
        job: ClaimedJob,
        left: list[int],
        digests: Sequence[str],
        run: Callable[[int], Awaitable[T]],
        told: list[T | EngineFailed | InvalidInput],
    ) -> None:
        """Run texts from the end of ``left``, one at least, while nobody else waits for long."""
        ends = time.monotonic() + TURN_S
        is_first = True
        while left:
            place = left[-1]
            try:
                waiting = await self._note(job, place, digests[place]) + self._in_line
                if waiting and not is_first and time.monotonic() > ends:
                    return
                told[place] = await run(place)
            except EngineFailed as error:
                told[place] = error
            except InvalidInput as error:
                told[place] = error
                await self._note(job, None)  # no engine had it: the next note must not clear it
            left.pop()
            is_first = False

    async def acquit(self, job: ClaimedJob, not_run: Container[int] = ()) -> None:
        """An ordinary call was computed: what others died at in it was not to blame.

        ``not_run``: places of texts that no engine had.
        """
        if digests := self.poison.named(job.queue.pool, job.payload, not_run):
            await self._persist(self._ledger.acquit, job.queue.pool, digests)

    async def _note(
        self, job: ClaimedJob, place: int | Literal["*"] | None, digest: str = ""
    ) -> int:
        """Note where the job is. Returns how many urgent jobs wait."""
        urgent = self._urgent() if isinstance(place, int) else ()
        return await self._persist(partial(self._ledger.mark, digest=digest), job, place, urgent)

    async def _persist(self, call: Callable[..., T], *arguments: Any) -> T:
        """What ``call`` returns, once Redis has answered."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await loop.run_in_executor(self._notes, call, *arguments)
            except (RedisUnavailable, QueueFull) as error:
                log.warning("a suspect waits: %s", error)
                await asyncio.sleep(_RETRY_S)

    async def _be_alone(self, visit_s: float = 0.0) -> None:
        """Wait until nothing but suspects is in flight; interactive jobs come in until bulk is."""
        self._open(True)
        await asyncio.sleep(visit_s)
        while self._has_others(("bulk",)):
            await asyncio.sleep(_LOOK_S)
        self._open(False)
        while self._has_others(keys.LANES):
            await asyncio.sleep(_LOOK_S)

    def _open(self, is_open: bool) -> None:
        with self._changed:
            self._is_open = is_open
            self._changed.notify_all()

    def _has_others(self, lanes: Sequence[keys.Lane]) -> bool:
        """Whether anything but suspects is in flight in ``lanes``, or about to be."""
        with self._changed:
            mine = [lane for lane in lanes if lane in self._windows]
            jobs = sum(self._windows[lane].in_flight[0] for lane in mine)
            suspects = sum(lane in mine for lane in self._suspects.values())
            return jobs > suspects or any(self._claims[lane] for lane in mine)


def verdict(job: ClaimedJob, alone: Callable[[int], dict[str, Any]]) -> Failure:
    """The end of a call that somebody waits for and that has a condemned text.

    Who waits can do nothing with the others. ``alone(place)`` are the fields of the payload of a
    call on that text only, which goes to the dead letter.
    """
    refused = []
    for place in job.condemned:
        data = codec.pack_call(job.function, {**job.payload, **alone(place)})
        tokens = estimate_tokens(len(data), 1)
        refused.append(Refused(place, "", PoisonText(field="text"), data, tokens))
    return Failure(PoisonText(indices=job.condemned), refused)


def raise_errors(told: Sequence[T | EngineFailed | InvalidInput]) -> list[T]:
    """The results; raises where there are errors, one that names all the texts of its kind."""
    errors = {i: found for i, found in enumerate(told) if isinstance(found, VecfleetError)}
    for kind in (PoisonText, TextsTooLong, EngineFailed):
        places = [place for place, error in errors.items() if isinstance(error, kind)]
        if places:
            first = errors[places[0]]
            raise kind(first.message, indices=places, field=first.field)
    for error in errors.values():
        raise error
    return [found for found in told if not isinstance(found, VecfleetError)]
