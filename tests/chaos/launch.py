"""Start roles of the product with faults planted in them; nothing of this is in the product.

    python -m chaos.launch [--crash-at POINT --nth N] [--mutant NAME] -- worker --engine fake ...

runs one ordinary command line in this process. ``--serve`` keeps a warm process instead, which
forks one role for each order that it reads: a role then starts in milliseconds instead of half a
second, and a fleet can die hundreds of times a minute. Orders and answers are lines of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from chaos import crash_points, mutants, settlements

_PRELOADED = (
    "chaos.asker",
    "chaos.client",
    "chaos.keeper_client",
    "chaos.poison_client",
    "httpx",
    "vecfleet.fleet.aggregator_command",
    "vecfleet.fleet.cli",
    "vecfleet.fleet.gateway_command",
    "vecfleet.fleet.worker_command",
    "vecfleet.gateway.app",
    "vecfleet.gateway.main",
    "vecfleet.producer.producer",
    "vecfleet.worker.aggregator_main",
    "vecfleet.worker.fake_engine",
    "vecfleet.worker.main",
    "vecfleet.worker.search_main",
)


@dataclass(frozen=True, slots=True)
class Order:
    """One role to start."""

    arguments: tuple[str, ...]  # of the command vecfleet; or "client" and those of our client
    log: str = ""  # where its output goes
    crash_at: str = ""
    nth: int = 1
    signal_there: int = signal.SIGKILL  # or SIGSTOP
    mutant: str = ""
    notes: bool = False  # whether Redis notes what becomes of its claims
    step_s: float = 0.0  # how long the fake engine takes for a step
    skew_s: float = 0.0  # how far its wall clock is ahead
    disk_full: str = ""  # while this file is there, segments meet a full disk

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Order:
        """The order that was sent as JSON."""
        return cls(**{**wire, "arguments": tuple(wire["arguments"])})


def shorten_leases(lease_s: float) -> None:
    """Let leases last ``lease_s``, and what goes with them; before the product is imported."""
    from vecfleet.common import keys

    assert "vecfleet.worker.ledger" not in sys.modules
    keys.LEASE_TTL_S, keys.HEARTBEAT_S = lease_s, lease_s / 5
    from vecfleet.worker import aggregator_main, heartbeat

    assert heartbeat.Timing().heartbeat_s == lease_s / 5
    names = list(heartbeat.Timing.__dataclass_fields__)
    defaults = list(heartbeat.Timing.__init__.__defaults__ or ())
    defaults[names.index("rescue_s")] = lease_s / 5
    heartbeat.Timing.__init__.__defaults__ = tuple(defaults)
    assert heartbeat.Timing().rescue_s == lease_s / 5
    assert aggregator_main._LEASE_RENEW_S > 0
    aggregator_main._LEASE_RENEW_S = lease_s / 5


def _slow_engine(step_s: float) -> None:
    from vecfleet.worker.fake_engine import FakeEngine, FakeSettings

    load = FakeEngine.load.__func__

    async def slow(cls: type, settings: FakeSettings | None = None) -> Any:
        name = (settings or FakeSettings()).name
        return await load(cls, FakeSettings(name=name, step_s=step_s))

    FakeEngine.load = classmethod(slow)


def _fill_disk(flag: str) -> None:
    """Segments cannot be written while ``flag`` is there; where no small disk can be mounted."""
    from vecfleet.worker import segment

    publish = segment.publish

    def refusing(path: Path, write: Any, *args: Any) -> None:
        def full(handle: int) -> None:
            if os.path.exists(flag):  # noqa: PTH110
                os.write(handle, b"the first bytes still fit")
                raise OSError(28, "No space left on device")
            write(handle)

        publish(path, full, *args)

    segment.publish = refusing


def _skew_clock(skew_s: float) -> None:
    """Let the wall clock be wrong, wherever the product reads it."""
    right = time.time
    time.time = lambda: right() + skew_s
    time.time_ns = lambda: int((right() + skew_s) * 1e9)

    class Wrong(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.fromtimestamp(time.time(), tz)

    for name, module in list(sys.modules.items()):
        if name.startswith("vecfleet.") and getattr(module, "datetime", None) is datetime.datetime:
            module.datetime = Wrong


def run(order: Order) -> int:
    """Plant what the order says and run its command line; returns the exit code."""
    if order.step_s:
        _slow_engine(order.step_s)
    if order.mutant:
        mutants.MUTANTS[order.mutant]()
    if order.disk_full:
        _fill_disk(order.disk_full)
    if order.skew_s:
        _skew_clock(order.skew_s)
    if order.crash_at:
        crash_points.install(order.crash_at, order.nth, order.signal_there)
    if order.notes:
        settlements.plant()
    if order.arguments[0] == "client":
        from chaos import client

        return client.main(order.arguments[1:])
    from vecfleet.fleet import cli

    return cli.run(order.arguments)


def _become(order: Order, parent: int) -> NoReturn:
    """The rest of a forked child's life."""
    code = 70
    try:
        from vecfleet.common.parent_death import dies_with

        ask_kernel = dies_with(parent)
        assert ask_kernel is not None
        ask_kernel()
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for handle, place in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(handle, place)
        code = run(order)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def serve() -> int:
    """Fork a role for each order on stdin, signal and reap them; until stdin closes."""
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    me = os.getpid()
    codes: dict[int, int] = {}
    print(json.dumps({"ready": me}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        match order.pop("do"):
            case "start":
                pid = os.fork()
                if pid == 0:
                    _become(Order.from_wire(order), me)
                answer["pid"] = pid
            case "signal":
                # Not reaped yet, so the number is still its own.
                if order["pid"] not in codes:
                    os.kill(order["pid"], order["signal"])
            case "poll":
                with contextlib.suppress(ChildProcessError):
                    while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                        codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
                answer["code"] = codes.get(order["pid"])
        print(json.dumps(answer), flush=True)
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="chaos.launch", description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--lease", type=float, default=0.0, help="seconds; 0: as in production")
    parser.add_argument("--crash-at", default="", choices=["", *crash_points.POINTS])
    parser.add_argument("--nth", type=int, default=1)
    parser.add_argument("--mutant", default="", choices=["", *mutants.MUTANTS])
    parser.add_argument("--step", type=float, default=0.0, help="seconds of an engine's step")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if given.lease:
        shorten_leases(given.lease)
    if given.serve:
        return serve()
    arguments = tuple(word for word in given.arguments if word != "--")
    return run(
        Order(
            arguments,
            crash_at=given.crash_at,
            nth=given.nth,
            mutant=given.mutant,
            step_s=given.step,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
