"""The one-machine fleet: Redis, workers, aggregator and gateway as children of one process.

Started in this order and stopped in the opposite one: Redis, the search process, the index's
writer, the workers, the gateway. What is kept stands below the data folder: ``redis/`` (append-only
file and socket), ``index/`` (collections), and while the fleet runs ``fleet.json``.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from vecfleet.common import keys
from vecfleet.common.errors import VecfleetError
from vecfleet.common.settings import FLEET_FILE, Settings
from vecfleet.fleet.append_only import make_whole
from vecfleet.fleet.console import FLEET, Console, log_line
from vecfleet.fleet.machine import answers, check_port, locked
from vecfleet.fleet.pool import group_size, sized, worker_specs
from vecfleet.fleet.presence import note_ready
from vecfleet.fleet.process import role_command
from vecfleet.fleet.redis_server import (
    RedisBinary,
    find_redis_server,
    free_port,
    is_ready,
    private_address,
    redis_arguments,
    redis_log_line,
)
from vecfleet.fleet.supervisor import ChildSpec, OnEvent, Output, Supervisor, stop_on_signals
from vecfleet.fleet.worker_plan import (
    Group,
    PlannedModel,
    choose_gpus,
    group_gpus,
    plan_workers,
)
from vecfleet.gateway.config import is_loopback
from vecfleet.worker.machine import read_gpus
from vecfleet.worker.resources import host_memory

_POLL_S = 0.1
_PATIENCE_S = 15.0  # between two lines that tell what the start waits for
_REDIS_DRAIN_S = 30.0


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """A fleet on this machine."""

    settings: Settings
    workers: int | None = None  # None: one for each GPU, or one on the CPU
    niceness: int = 10  # of workers and the index's writer: searches and the gateway go first


class Fleet:
    """All processes of a one-machine fleet. Construct it on a running event loop."""

    def __init__(
        self, options: FleetOptions, output: Output, on_event: OnEvent | None = None
    ) -> None:
        """``output`` gets every line that a process prints, with the process's name."""
        self._settings = options.settings
        self._options = options
        self._output = output
        self._data = options.settings.data.resolve()
        self._supervisor = Supervisor(self._print, on_event)
        self._held = ExitStack()
        self._port = options.settings.port or free_port()
        self._address = private_address(self._data / "redis")
        self._noting: asyncio.Task[None] | None = None

    @property
    def http_url(self) -> str:
        """Where the gateway answers."""
        host = self._settings.host
        shown = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
        scheme = "https" if self._settings.tls_cert else "http"
        return f"{scheme}://{f'[{shown}]' if ':' in shown else shown}:{self._port}"

    @property
    def redis_url(self) -> str:
        """The fleet's Redis; the URL may hold a password."""
        return self._address.url

    def pids(self) -> dict[str, int]:
        """The processes that run now, by name."""
        return self._supervisor.pids()

    async def start(self) -> None:
        """Start everything and wait until the gateway answers and every role is at work.

        Raises ``ConfigError`` when the data folder is in use, the port is taken or no Redis is
        to be had; what a child reports later comes from ``failure``.
        """
        self._data.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(locked(self._data))
        check_port(self._settings.host, self._port)
        binary = find_redis_server()
        (self._data / "redis").mkdir(exist_ok=True)
        folder = self._data / "redis"
        memory = redis_memory_bytes(self._settings, host_memory().total_bytes)
        arguments = redis_arguments(binary, self._address, folder, max_memory_bytes=memory)
        self._say(f"starting with {binary}, data in {self._data}")
        self._supervisor.start(
            ChildSpec(
                "redis",
                (*arguments, "--loglevel", "warning"),
                drain_s=_REDIS_DRAIN_S,
                death_signal=signal.SIGTERM,  # it writes its file to the end
                shows_itself=False,
                prepare=lambda: _make_whole(binary, folder),
            )
        )
        await self._until(lambda: [] if is_ready(self.redis_url) else ["redis"])
        for stage in await asyncio.to_thread(lambda: list(self._stages())):
            self._supervisor.start(*stage)
        self._noting = asyncio.create_task(note_ready(self._supervisor, self.redis_url))
        self._held.enter_context(self._told())
        await self._until(self._missing)
        self._supervisor.settled()

    async def failure(self) -> VecfleetError:
        """Wait until a process cannot be kept running, and tell why."""
        return await self._supervisor.failure()

    async def stop(self) -> None:
        """Drain everything, the gateway first and Redis last."""
        await self._supervisor.stop()
        if self._noting is not None:
            self._noting.cancel()
            await asyncio.gather(self._noting, return_exceptions=True)
        self._held.close()

    def kill(self) -> None:
        """End every process at once; ``stop`` then only waits."""
        self._supervisor.kill()

    def _stages(self) -> Iterator[list[ChildSpec]]:
        index = ("aggregator", "--data", str(self._data), "--only")
        yield [self._role("search", *index, "search")]
        yield [self._role("writer", *index, "writer", *self._standing_back())]
        yield self._workers()
        models = ["--model", served_name(self._settings.model)]
        if self._settings.reranker:
            models += ["--reranker", served_name(self._settings.reranker)]
        listen = ("--host", self._settings.host, "--port", str(self._port), *self._keys())
        yield [self._role("gateway", "gateway", *listen, *models, shows_itself=False)]

    def _keys(self) -> list[str]:
        settings = self._settings
        keys = None if settings.no_keys else settings.find_keys_file()
        is_open = keys is None and is_loopback(settings.host)  # this machine's user, for himself
        given = ["--no-keys"] if settings.no_keys or is_open else []
        for name, path in (
            ("--keys-file", keys),
            ("--tls-cert", settings.tls_cert),
            ("--tls-key", settings.tls_key),
        ):
            given += [name, str(path)] if path else []
        return given

    def _workers(self) -> list[ChildSpec]:
        settings = self._settings
        embedder = sized(settings.model, settings)
        groups = _groups(settings, [embedder])
        number = self._options.workers or len(groups)
        placed = [
            ("worker" if number == 1 else f"worker-{n}", embedder, groups[n % len(groups)])
            for n in range(number)
        ]
        if settings.reranker:
            placed.append(("reranker", sized(settings.reranker, settings), groups[0]))
        return worker_specs(
            plan_workers(placed, settings.gpu_memory_utilization),
            settings,
            self.redis_url,
            niceness=self._options.niceness,
            served_names={model.name: served_name(model.name) for _, model, _ in placed},
        )

    def _standing_back(self) -> tuple[str, str]:
        return "--niceness", str(self._options.niceness)

    def _role(self, name: str, *arguments: str, shows_itself: bool = True) -> ChildSpec:
        return ChildSpec(
            name,
            # JSON lines, whatever the terminal: the console makes them readable.
            tuple(role_command("--log-format", "json", *arguments)),
            environment=self._settings.environment(redis_url=self.redis_url, data=str(self._data)),
            shows_itself=shows_itself,
        )

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell the commands that are run beside us where the fleet is."""
        path = self._data / FLEET_FILE
        about = {"redis_url": self.redis_url, "http_url": self.http_url, "pid": os.getpid()}
        fresh = path.with_suffix(".new")
        fresh.touch(mode=0o600)  # the URL may hold a password
        fresh.write_text(json.dumps(about))
        fresh.replace(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    async def _until(self, missing: Callable[[], list[str]]) -> None:
        said = time.monotonic()
        while names := await asyncio.to_thread(missing):
            if time.monotonic() - said >= _PATIENCE_S:
                said = time.monotonic()
                self._say(f"still waiting for {', '.join(names)}")
            await asyncio.sleep(_POLL_S)

    def _missing(self) -> list[str]:
        """The processes that are not at work yet."""
        names = sorted(self._supervisor.not_ready())
        return names or ([] if answers(f"{self.http_url}/health") else ["gateway"])

    def _print(self, name: str, line: str) -> None:
        shown = redis_log_line(line) if name == "redis" else line
        if shown is not None:
            self._output(name, shown)

    def _say(self, message: str) -> None:
        self._output(FLEET, log_line(message))


def redis_memory_bytes(settings: Settings, total_bytes: int) -> int:
    """What this fleet's Redis may hold: all that the limits let wait, and half of that again.

    At most half of what the machine has, ``total_bytes``.
    """
    pools = 3 if settings.reranker else 2  # an embedding model reranks, too
    waiting = settings.admission().most_bytes(pools * len(keys.LANES))
    return min(waiting * 3 // 2, total_bytes // 2)


def _make_whole(binary: RedisBinary, folder: Path) -> str:
    lost = make_whole(binary.path, folder)
    return f"its file ended in half a transaction; {lost} bytes were cut off" if lost else ""


def _groups(settings: Settings, models: Sequence[PlannedModel]) -> list[Group]:
    """The GPUs that ``--device`` means, as many at a time as a model needs; or the CPU."""
    kind, _, number = settings.device.partition(":")
    if kind not in ("auto", "cuda"):
        return [()]
    gpus = choose_gpus(number or "all", read_gpus())
    return group_gpus(gpus, group_size(models, gpus, settings))


def served_name(model: str) -> str:
    """The name that clients use for a model: a directory goes by its last part."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else model


def run_up(options: FleetOptions, stream: TextIO | None = None) -> int:
    """Run a fleet until SIGTERM or Ctrl-C; returns the exit code."""
    console = Console(stream, options.settings.log_format)
    return asyncio.run(_run_up(options, console))


async def _run_up(options: FleetOptions, console: Console) -> int:
    began = time.monotonic()

    def on_event(event: str, name: str) -> None:
        if event == "stopping":
            console.say(f"{name} drains")

    fleet = Fleet(options, console.line, on_event)
    stop = stop_on_signals(fleet.kill)
    failure = asyncio.create_task(fleet.failure())
    stopped = asyncio.create_task(stop.wait())
    starting = asyncio.create_task(fleet.start())
    try:
        await _first(starting, failure, stopped)
        if starting.done():
            starting.result()
            took = f"{time.monotonic() - began:.1f} s"
            console.say(
                f"ready at {fleet.http_url} after {took}; Ctrl-C drains",
                data=str(options.settings.data),
            )
            await _first(failure, stopped)
        if failure.done():
            raise failure.result()
        return 0
    finally:
        for task in (starting, failure, stopped):
            task.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await fleet.stop()
        console.say(f"stopped; all data is in {options.settings.data}")


async def _first(*tasks: asyncio.Task[Any]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
