"""What the roles behind the queue share: their name, their ends, and chores beside the work."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from vecfleet.common.errors import StaleWriter, VecfleetError
from vecfleet.worker.heartbeat import OnEvent

log = logging.getLogger(__name__)


@asynccontextmanager
async def beside(*chores: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Inside, ``chores`` run; they are cancelled and awaited at its end."""
    tasks = [asyncio.create_task(chore) for chore in chores]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def every(period_s: float, chore: Callable[[], None], on_stale: Callable[[], None]) -> None:
    """Do ``chore`` in a thread, for ever; a ``StaleWriter`` ends it with a call of ``on_stale``."""
    while True:
        await asyncio.sleep(period_s)
        try:
            await asyncio.to_thread(chore)
        except StaleWriter as error:
            log.error("%s", error)
            on_stale()
            return
        except VecfleetError as error:
            log.warning("%s", error)
        except Exception:
            log.exception("a chore failed; it is tried again")


def stop_on_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """The first SIGTERM or SIGINT asks to stop, the second to hurry."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    return stop, hurry


def saying(line: str, on_event: OnEvent | None) -> OnEvent:
    """Log ``line`` once the worker is ready, that is: registered and announced."""

    def tell(name: str, count: int) -> None:
        if name == "ready":
            log.info("%s", line)
        if on_event is not None:
            on_event(name, count)

    return tell


def unique_name(role: str) -> str:
    """Never used again: RQ keeps a dead worker's name for a while."""
    return f"{role}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
