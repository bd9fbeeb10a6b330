"""A call of a step loop on its way, and how its end is told on the caller's event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vecfleet.common.errors import VecfleetError
from vecfleet.worker.calls import Encoded, Rows
from vecfleet.worker.engine import Priority

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class StepCall:
    """Texts of one caller: what is known of them, and how many are left."""

    future: asyncio.Future[Rows]
    loop: asyncio.AbstractEventLoop
    priority: Priority
    rows: Rows
    left: int
    failures: dict[int, BaseException] = field(default_factory=dict)
    encode_now: Callable[[], list[Encoded[Any] | BaseException]] | None = None


def settle(finished: list[tuple[StepCall, VecfleetError | None]]) -> None:
    """Give callers of this event loop their rows or errors."""
    for call, error in finished:
        if call.future.done():
            continue
        if error is None:
            call.future.set_result(call.rows)
        else:
            call.future.set_exception(error)


def tell_on(loop: asyncio.AbstractEventLoop, tell: Callable[..., None], *args: Any) -> None:
    """Call ``tell`` on the event loop; nobody waits any more where that is closed."""
    try:
        loop.call_soon_threadsafe(tell, *args)
    except RuntimeError:
        log.debug("the caller's event loop is closed")
