"""Where a process can be told to die: named steps of the product, found from outside.

The product has no hooks for this. A point names a method, which is wrapped, or a step that the
index tells the ``CrashPoint`` it is given. A name that wraps nothing is an error, so that a method
which was renamed in the product does not quietly turn a test into one that tests nothing.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

_WRITER = "vecfleet.worker.partition:PartitionWriter.open"
_LEDGER = "vecfleet.worker.ledger:Ledger"
_QUEUES = "vecfleet.common.queue_client:QueueClient"
_FLEET = "vecfleet.common.fleet_client:FleetClient"
_BOOK = "vecfleet.common.submission:Submissions"
_JOURNAL = "vecfleet.producer.journal:Journal"
_CATALOG = "vecfleet.worker.catalog:Catalog"


def _all(_: tuple[Any, ...], __: Any) -> bool:
    return True


def _with_work(_: tuple[Any, ...], result: Any) -> bool:
    """What claimed or rescued something."""
    return bool(result[0] if isinstance(result, tuple) else result)


def _with_place(arguments: tuple[Any, ...], _: Any) -> bool:
    """What noted a text, and not that the job waits."""
    return arguments[2] is not None


@dataclass(frozen=True, slots=True)
class Point:
    """One step at which a process dies."""

    target: str  # module:Class.method
    when: Literal["before", "after"] = "before"
    step: str = ""  # of the index's CrashPoint; the target is then what takes one
    counts: Callable[[tuple[Any, ...], Any], bool] = _all  # which passes: arguments and result
    needs_deaths: bool = False  # it is reached where other workers die


POINTS: dict[str, Point] = {
    "producer.before_enqueue": Point(f"{_QUEUES}.enqueue"),
    "producer.after_enqueue": Point(f"{_QUEUES}.enqueue", "after"),
    "producer.before_done": Point(f"{_JOURNAL}.done"),
    "producer.after_done": Point(f"{_JOURNAL}.done", "after"),
    "producer.before_close": Point(f"{_BOOK}.close"),
    "producer.after_close": Point(f"{_BOOK}.close", "after"),
    "gateway.before_enqueue": Point(f"{_FLEET}.enqueue_blocks"),
    "gateway.after_enqueue": Point(f"{_FLEET}.enqueue_blocks", "after"),
    "gateway.before_close": Point(f"{_BOOK}.close"),
    "gateway.after_close": Point(f"{_BOOK}.close", "after"),
    "worker.after_claim": Point(f"{_LEDGER}.claim_or_wait", "after", counts=_with_work),
    "worker.after_engine": Point("vecfleet.worker.fake_engine:FakeEngine.embed", "after"),
    "worker.before_settle": Point(f"{_LEDGER}.settle"),
    "worker.after_settle": Point(f"{_LEDGER}.settle", "after"),
    "worker.text_noted": Point(f"{_LEDGER}.mark", "after", counts=_with_place, needs_deaths=True),
    "worker.before_rescue": Point(f"{_LEDGER}.rescue"),
    "worker.after_rescue": Point(
        f"{_LEDGER}.rescue", "after", counts=_with_work, needs_deaths=True
    ),
    "aggregator.after_claim": Point(f"{_LEDGER}.claim_or_wait", "after", counts=_with_work),
    "aggregator.segment_written": Point(_WRITER, step="written"),
    "aggregator.segment_fsynced": Point(_WRITER, step="synced"),
    "aggregator.segment_renamed": Point(_WRITER, step="renamed"),
    "aggregator.before_commit": Point(_WRITER, step="before commit"),
    "aggregator.manifest_committed": Point(_WRITER, step="committed"),
    "aggregator.merge_swapped": Point(_WRITER, step="swapped"),
    "aggregator.collection_created": Point(f"{_CATALOG}.create", "after"),
    "aggregator.collection_deleted": Point(f"{_CATALOG}.delete", "after"),
    "aggregator.before_settle": Point(f"{_LEDGER}.settle"),
    "aggregator.after_settle": Point(f"{_LEDGER}.settle", "after"),
}


def role_of(name: str) -> str:
    """The role that a point belongs to."""
    return name.partition(".")[0]


def find(target: str) -> tuple[type, str, Any]:
    """The class, the name and the function that ``target`` names; raises ``LookupError``."""
    module_name, _, path = target.partition(":")
    class_name, _, method = path.partition(".")
    owner = getattr(importlib.import_module(module_name), class_name, None)
    function = inspect.getattr_static(owner, method, None) if owner is not None else None
    if function is None:
        raise LookupError(f"there is no {target}: the product has changed, change the harness too")
    return owner, method, function


def install(name: str, nth: int, number: int = signal.SIGKILL) -> None:
    """Have this process send itself SIGKILL or SIGSTOP at the ``nth`` pass of a point."""
    if name not in POINTS:
        raise LookupError(f"{name} is no crash point; there are: {', '.join(POINTS)}")
    point = POINTS[name]
    passes = _Passes(nth, number)
    owner, method, function = find(point.target)
    if point.step:
        _give_crash_point(owner, method, function, point.step, passes)
    else:
        setattr(owner, method, _wrapped(function, point, passes))


class _Passes:
    """Counts, and ends or stops the process at the last one."""

    def __init__(self, nth: int, number: int) -> None:
        self._left = nth
        self._number = number
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            is_last = self._left == 0
        if is_last:
            os.kill(os.getpid(), self._number)


def _wrapped(function: Any, point: Point, passes: _Passes) -> Callable[..., Any]:
    before = point.when == "before"

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def call_async(*args: Any, **options: Any) -> Any:
            if before:
                passes()
            result = await function(*args, **options)
            if not before and point.counts(args, result):
                passes()
            return result

        return call_async

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if before:
            passes()
        result = function(*args, **options)
        if not before and point.counts(args, result):
            passes()
        return result

    return call


def _give_crash_point(owner: type, method: str, function: Any, step: str, passes: _Passes) -> None:
    opened = function.__func__  # a classmethod
    if "crash" not in inspect.signature(opened).parameters:
        raise LookupError(f"{owner.__name__}.{method} takes no crash point any more")

    def crash(reached: str) -> None:
        if reached == step:
            passes()

    @functools.wraps(opened)
    def call(cls: type, *args: Any, **options: Any) -> Any:
        return opened(cls, *args, **{**options, "crash": crash})

    setattr(owner, method, classmethod(call))
