"""Getting blocks out of a stream that may wait or compute, without holding the event loop up."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

from vecfleet.producer.cutting import CutBlock, Cutter, Item
from vecfleet.producer.items import Rejected

MOST_BLOCKS = 16
_MOST_BYTES = 4 << 20
_MOST_S = 0.1  # a slow stream's blocks go out as they come
_ITEMS_A_TURN = 256

_T = TypeVar("_T")
_P = ParamSpec("_P")


class WorkLine(Executor):
    """Runs functions one after the other in whichever thread calls ``serve``."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Line a call up."""
        future: Future[_T] = Future()
        self._work.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let ``serve`` return after what is lined up."""
        self._work.put(None)

    def serve(self) -> None:
        """Run what comes until ``shutdown``; a ``KeyboardInterrupt`` passes, and may be served on.

        The call that it interrupts never ends, so whoever awaits it must await the stop as well.
        """
        while (entry := self._work.get()) is not None:
            future, call = entry
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

    def start(self) -> None:
        """Serve in a thread of its own, which does not keep the process alive."""
        threading.Thread(target=self.serve, name="producer-reader", daemon=True).start()


@dataclass(slots=True)
class Pulled:
    """What one pull gave."""

    blocks: list[CutBlock]
    rejects: list[Rejected]
    is_end: bool = False


class Puller(Protocol):
    """Gives the next blocks of a stream."""

    def pull(self) -> Coroutine[Any, Any, Pulled]:
        """Some blocks or rejects, or the end with the last of them."""


class IterablePuller:
    """Pulls from an iterable, always in the thread of one ``WorkLine``."""

    def __init__(
        self, items: Iterable[Item], cutter: Cutter, line: WorkLine, *, with_digests: bool
    ) -> None:
        self._line = line
        self._cutter = cutter
        self._with_digests = with_digests
        self._blocks = _all_blocks(items, cutter)
        self._failure: Exception | None = None

    async def pull(self) -> Pulled:
        """What can be had quickly."""
        return await asyncio.get_running_loop().run_in_executor(self._line, self._pull)

    def _pull(self) -> Pulled:
        if self._failure is not None:
            raise self._failure
        pulled = Pulled([], [])
        try:
            self._fill(pulled)
        except Exception as error:
            self._failure = error  # after what came before it
        pulled.rejects = self._cutter.take_rejects()
        return pulled

    def _fill(self, pulled: Pulled) -> None:
        size = 0
        deadline = time.monotonic() + _MOST_S
        for cut in self._blocks:
            if cut is None:
                return
            if self._with_digests:
                cut.set_digest()
            pulled.blocks.append(cut)
            size += cut.block.size
            is_enough = len(pulled.blocks) >= MOST_BLOCKS or size >= _MOST_BYTES
            if is_enough or time.monotonic() > deadline:
                return
        pulled.is_end = True


class AsyncPuller:
    """Pulls from an async iterable, on the loop."""

    def __init__(self, items: AsyncIterable[Item], cutter: Cutter, *, with_digests: bool) -> None:
        self._items = aiter(items)
        self._cutter = cutter
        self._with_digests = with_digests

    async def pull(self) -> Pulled:
        """What a few items make."""
        items: list[Item] = []
        pulled = Pulled([], [])
        async for item in self._items:
            items.append(item)
            if len(items) == _ITEMS_A_TURN:
                break
        else:
            pulled.is_end = True
        pulled.blocks += [cut for cut in self._cutter.feed(items) if cut is not None]
        if pulled.is_end:
            pulled.blocks += self._cutter.end()
        if self._with_digests:
            for cut in pulled.blocks:
                cut.set_digest()
        pulled.rejects = self._cutter.take_rejects()
        await asyncio.sleep(0)  # a stream that never waits must not keep the loop to itself
        return pulled


def _all_blocks(items: Iterable[Item], cutter: Cutter) -> Iterator[CutBlock | None]:
    yield from cutter.feed(items)
    yield from cutter.end()
