"""Keeping child processes running: start, restart after a crash, stop in order, leave no orphan.

    stopped ──start──► running ──its end──► waiting ──delay──► running
                          │                    │
                          └───────stop─────────┴──► stopped

Children stop in the reverse order of their start, those of one stage together. Each is the leader
of a process group of its own, so that Ctrl-C in a terminal reaches only us, and carries a mark that
whatever it starts inherits, so that what it leaves behind is ended with it; the kernel ends a child
whose supervisor died.

Children may share a turn: then one of them starts only when the one before is ready, or has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vecfleet.common.errors import ConfigError, VecfleetError
from vecfleet.fleet.console import log_line
from vecfleet.fleet.process import dies_with_parent, kill_family, marked

EXIT_CONFIG = 2  # a child that ends so was told nonsense: to start it again does not help
EXIT_TRY_AGAIN = 3  # a child that ends so could do nothing for it: Redis was away

FIRST_DELAY_S = 0.5
LAST_DELAY_S = 30.0
STEADY_S = 60.0  # a child that ran this long starts again without delay
MAX_FAILED_STARTS = 3
_LINE_BYTES = 1 << 20
_PUMP_END_S = 1.0
_FAMILY_END_S = 10.0  # a killed process may take so long to free what it held
_FAMILY_POLL_S = 0.02

Output = Callable[[str, str], None]  # a child's name and a line it printed
OnEvent = Callable[[str, str], None]  # what happened ("started", "ended", ...), and to whom


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run, and how to end it."""

    name: str
    command: tuple[str, ...]
    drain_s: float = 90.0  # from SIGTERM to SIGKILL
    early_drain_s: float | None = None  # the same before it is ready: it has nothing to finish
    death_signal: signal.Signals = signal.SIGKILL  # what it gets when the supervisor dies
    environment: Mapping[str, str] | None = field(default=None, repr=False)  # None: ours
    max_failed_starts: int = MAX_FAILED_STARTS  # in a row, while the fleet comes up
    turn: asyncio.Lock | None = field(default=None, repr=False, compare=False)
    shows_itself: bool = True  # in Redis, once it is at work
    # Run in a thread before each start; what it returns is told.
    prepare: Callable[[], str] | None = field(default=None, repr=False, compare=False)


@dataclass(slots=True, eq=False)
class _Child:
    spec: ChildSpec
    process: asyncio.subprocess.Process | None = None
    task: asyncio.Task[None] | None = None
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    failures: int = 0  # since it last ran steadily
    failed_starts: int = 0  # since it was last ready
    is_ready: bool = False
    has_been_ready: bool = False  # so it can run: whatever ends it now may pass
    has_turn: bool = False

    @property
    def pid(self) -> int | None:
        """Of what runs now: that of one that ended may be somebody else's by now."""
        process = self.process
        return None if process is None or process.returncode is not None else process.pid


class Supervisor:
    """Runs children until told to stop them."""

    def __init__(self, output: Output | None = None, on_event: OnEvent | None = None) -> None:
        """Without ``output`` children write where this process does."""
        self._output = output
        self._on_event = on_event or (lambda event, name: None)
        self._stages: list[list[_Child]] = []
        self._failure: asyncio.Future[VecfleetError] = asyncio.get_running_loop().create_future()
        self._settled = False

    def start(self, *specs: ChildSpec) -> None:
        """Start a stage: children that will also be stopped together."""
        stage = [_Child(spec) for spec in specs]
        self._stages.append(stage)
        for child in stage:
            child.task = asyncio.create_task(self._keep(child), name=f"keep-{child.spec.name}")

    def settled(self) -> None:
        """All is up: from now on a child may fail as often as it likes, and is started again."""
        self._settled = True

    def ready(self, pids: Container[int]) -> None:
        """The children with these process ids are at work; whose turn it was lets the next go."""
        for child in self._children():
            if not child.is_ready and child.pid is not None and child.pid in pids:
                child.is_ready = child.has_been_ready = True
                child.failed_starts = 0
                self._end_turn(child)
                self._on_event("ready", child.spec.name)

    def not_ready(self) -> set[str]:
        """The children that should show themselves and did not yet, by name."""
        return {
            child.spec.name
            for child in self._children()
            if child.spec.shows_itself and not child.is_ready
        }

    async def failure(self) -> VecfleetError:
        """Wait until a child cannot be kept running, and tell why."""
        return await asyncio.shield(self._failure)

    def pids(self) -> dict[str, int]:
        """The processes that run now, by name."""
        found = ((child.spec.name, child.pid) for child in self._children())
        return {name: pid for name, pid in found if pid is not None}

    async def stop(self) -> None:
        """Drain all children, those started last first."""
        for stage in reversed(self._stages):
            await asyncio.gather(*(self._stop(child) for child in stage))
        self._stages.clear()

    def kill(self) -> None:
        """End all children at once; ``stop`` then only waits for their end."""
        for child in self._children():
            child.stopping.set()
            if child.pid is not None:
                _kill_group(child.pid)

    def _children(self) -> Iterable[_Child]:
        return (child for stage in self._stages for child in stage)

    async def _stop(self, child: _Child) -> None:
        child.stopping.set()
        if child.process is not None and child.process.returncode is None:
            self._on_event("stopping", child.spec.name)
            with contextlib.suppress(ProcessLookupError):
                child.process.terminate()
        if child.task is None:
            return
        drain_s = child.spec.drain_s
        if not child.is_ready and child.spec.early_drain_s is not None:
            drain_s = child.spec.early_drain_s
        done, _ = await asyncio.wait([child.task], timeout=drain_s)
        if not done and child.pid is not None:
            self._tell(child, f"did not stop within {drain_s:g} s and is killed")
            _kill_group(child.pid)
        await child.task

    async def _keep(self, child: _Child) -> None:
        loop = asyncio.get_running_loop()
        while not child.stopping.is_set():
            await self._begin_turn(child)
            started = loop.time()
            try:
                if child.stopping.is_set():
                    break
                end = await self._run(child)
            finally:
                was_ready, child.is_ready = child.is_ready, False
                self._end_turn(child)
            if child.stopping.is_set():
                break
            if loop.time() - started >= STEADY_S:
                child.failures = 0
            child.failures += 1
            child.failed_starts += not was_ready and end != EXIT_TRY_AGAIN
            self._on_event("ended", child.spec.name)
            if self._is_hopeless(child, end):
                return
            delay = restart_delay_s(child.failures)
            self._tell(child, f"ended ({describe_end(end)}); starts again in {delay:g} s")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await child.stopping.wait()
        self._on_event("stopped", child.spec.name)

    async def _begin_turn(self, child: _Child) -> None:
        if child.spec.turn is not None:
            await child.spec.turn.acquire()
            child.has_turn = True

    def _end_turn(self, child: _Child) -> None:
        if child.spec.turn is not None and child.has_turn:
            child.has_turn = False
            child.spec.turn.release()

    async def _run(self, child: _Child) -> int | VecfleetError:
        """Run it to its end; returns its exit code, or why it could not be run."""
        try:
            if child.spec.prepare is not None and (
                said := await asyncio.to_thread(child.spec.prepare)
            ):
                self._tell(child, said)
            return await self._run_once(child)
        except VecfleetError as error:
            return error
        except OSError as error:
            return ConfigError(f"cannot run {child.spec.command[0]}: {error}")
        except Exception as error:  # no thread to be had, too: the task must not end without a word
            return VecfleetError(f"cannot keep {child.spec.name} running: {error!r}")

    async def _run_once(self, child: _Child) -> int:
        # A pipe of our own: asyncio's would keep `wait` from returning for as long as anything that
        # the child started holds its other end.
        reading, writing = os.pipe() if self._output else (None, None)
        environment, mark = marked(child.spec.environment)
        try:
            process = await asyncio.create_subprocess_exec(
                *child.spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                env=environment,
                process_group=0,
                preexec_fn=dies_with_parent(child.spec.death_signal),
            )
        except Exception:
            if reading is not None:
                os.close(reading)
            await _end_family(mark)  # it may run, and only the watch for its end not
            raise
        finally:
            if writing is not None:
                os.close(writing)
        child.process = process
        self._on_event("started", child.spec.name)
        if child.stopping.is_set():  # told to stop while it was being started
            process.terminate()
        pump = asyncio.create_task(self._pump(child.spec.name, reading))
        try:
            return await process.wait()
        finally:
            _kill_group(process.pid)  # what it may have left behind
            await _end_family(mark)
            await asyncio.wait([pump], timeout=_PUMP_END_S)
            pump.cancel()

    async def _pump(self, name: str, reading: int | None) -> None:
        if reading is None or self._output is None:
            return
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(reading, "rb", 0)
        )
        rest = b""
        try:
            while chunk := await stream.read(1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > _LINE_BYTES:
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._output(name, line.decode(errors="replace").rstrip("\r"))
            if rest:
                self._output(name, rest.decode(errors="replace"))
        finally:
            transport.close()

    def _is_hopeless(self, child: _Child, end: int | VecfleetError) -> bool:
        name = child.spec.name
        error: VecfleetError | None = None
        if child.has_been_ready:
            return False
        if isinstance(end, VecfleetError) and child.process is None:
            error = end  # it never ran; else the machine may be short of something for a moment
        elif end == EXIT_CONFIG:
            error = ConfigError(f"{name} cannot start as it is told to; its own message tells why")
        elif not self._settled and child.failed_starts >= child.spec.max_failed_starts:
            error = VecfleetError(
                f"{name} failed {child.failed_starts} times in a row while starting "
                f"({describe_end(end)}); its own messages tell why"
            )
        if error is not None:
            self._fail(error)
        return error is not None

    def _fail(self, error: VecfleetError) -> None:
        if not self._failure.done():
            self._failure.set_result(error)

    def _tell(self, child: _Child, message: str) -> None:
        if self._output is not None:
            self._output(child.spec.name, log_line(message, level="warning"))


def restart_delay_s(failures: int) -> float:
    """How long to wait after the n-th failure in a row, n >= 1."""
    return float(min(LAST_DELAY_S, FIRST_DELAY_S * 2 ** (failures - 1)))


def describe_end(end: int | VecfleetError) -> str:
    """How a process ended, or why it could not be started, in words."""
    if isinstance(end, VecfleetError):
        return end.message
    if end >= 0:
        return f"exit code {end}"
    try:
        return f"killed by {signal.Signals(-end).name}"
    except ValueError:
        return f"killed by signal {-end}"


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


async def _end_family(mark: str) -> None:
    """End what left the group, and wait until it is gone: it may hold memory that we need."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_FAMILY_END_S):
            while True:
                # For a moment there may be no file or thread to look with.
                with contextlib.suppress(OSError, RuntimeError):
                    if not await asyncio.to_thread(kill_family, mark):
                        return
                await asyncio.sleep(_FAMILY_POLL_S)


async def run_children(specs: Sequence[ChildSpec]) -> int:
    """Run ``specs`` until SIGTERM or Ctrl-C, stop them in reverse order; returns an exit code."""
    supervisor = Supervisor()
    stop = stop_on_signals(supervisor.kill)
    for spec in specs:
        supervisor.start(spec)
    supervisor.settled()
    failure = asyncio.create_task(supervisor.failure())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([failure, stopped], return_when=asyncio.FIRST_COMPLETED)
    await supervisor.stop()
    for task in (failure, stopped):
        if not task.done():
            task.cancel()
    return EXIT_CONFIG if failure.done() and not failure.cancelled() else 0


def stop_on_signals(at_once: Callable[[], None]) -> asyncio.Event:
    """An event that the first SIGTERM or Ctrl-C sets; a second one calls ``at_once``."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            at_once()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    return stop
