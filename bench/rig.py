"""A whole fleet, as ``vecfleet up`` runs it, and what its processes use."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import urlsplit

from vecfleet.bench import processes
from vecfleet.bench.child import Child
from vecfleet.bench.worker_status import fresh_worker_status, worker_status
from vecfleet.common.collection import Collection
from vecfleet.common.errors import EngineFailed
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.redis_client import connect_async
from vecfleet.common.settings import Settings
from vecfleet.fleet.up import Fleet, FleetOptions

_POLL_S = 0.1
_CHILDREN = {"writer": "builders", "redis": "redis_rewrites"}  # told apart from their parents
CALM_S = 3.0  # two rounds of the writer's maintenance without any change


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What each process has used up to now, the builders of the writer told apart."""

    cpu_s: dict[str, float]
    anon_bytes: dict[str, int]

    def cpu_since(self, before: Snapshot) -> dict[str, float]:
        """CPU seconds of each process between two snapshots."""
        return {name: used - before.cpu_s.get(name, 0.0) for name, used in self.cpu_s.items()}


class Rig:
    """A running fleet in a folder of its own."""

    def __init__(self, settings: Settings) -> None:
        """``settings`` name the data folder, the engine and the model; the port is free."""
        self._settings = settings
        self._log = (settings.data / "fleet.log").open("a")
        self._fleet = Fleet(FleetOptions(settings), self._note)
        self._stack = AsyncExitStack()
        self.client: FleetClient

    @property
    def folder(self) -> Path:
        """Where the fleet's data and logs are."""
        return self._settings.data

    @property
    def address(self) -> tuple[str, int]:
        """The gateway's host and port."""
        parts = urlsplit(self._fleet.http_url)
        return parts.hostname or "127.0.0.1", parts.port or 80

    async def __aenter__(self) -> Self:
        self._stack.callback(self._log.close)
        self._stack.push_async_callback(self._fleet.stop)
        try:
            starting = asyncio.create_task(self._fleet.start())
            failure = asyncio.create_task(self._fleet.failure())
            await asyncio.wait((starting, failure), return_when=asyncio.FIRST_COMPLETED)
            if failure.done():
                starting.cancel()
                tail = (self.folder / "fleet.log").read_text(errors="replace")[-1500:]
                raise EngineFailed(f"{failure.result().message}\n{tail}")
            failure.cancel()
            await starting
            client = FleetClient(connect_async(self._fleet.redis_url))
            self.client = await self._stack.enter_async_context(client)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    @property
    def worker_pid(self) -> int:
        """The process of the engine."""
        return self._fleet.pids()["worker"]

    def feeder(self, texts: Path) -> Child:
        """A producer's process for this fleet."""
        return Child("feeder", self.folder / "feeder.log", self._fleet.redis_url, str(texts))

    def snapshot(self) -> Snapshot:
        """What each process has used."""
        cpu_s: dict[str, float] = {}
        anon_bytes: dict[str, int] = {}
        for name, pid in self._fleet.pids().items():
            used = processes.usage(pid)
            cpu_s[name], anon_bytes[name] = used.cpu_s, used.anon_bytes
            if name in _CHILDREN:
                cpu_s[_CHILDREN[name]] = used.children_cpu_s
                anon_bytes[_CHILDREN[name]] = used.children_anon_bytes
        return Snapshot(cpu_s, anon_bytes)

    async def redis_memory(self) -> int:
        """Redis's ``used_memory``, bytes."""
        about: dict[str, Any] = cast(Any, await self.client.redis.info("memory"))
        return int(about["used_memory"])

    async def worker_status(self) -> dict[str, float]:
        """The numbers in the worker's last heartbeat."""
        return await worker_status(self.client.redis)

    async def fresh_worker_status(self, name: str) -> dict[str, float]:
        """The worker's status just after its counter ``name`` has changed."""
        return await fresh_worker_status(self.client.redis, name)

    async def until_calm(self, collection: Collection, calm_s: float = CALM_S) -> dict[str, Any]:
        """Wait until nothing is merged or built any more; returns the collection's numbers.

        A builder that stands back behind other processes counts as building.
        """
        last: tuple[dict[str, Any], float] = {}, -1.0
        since = time.monotonic()
        while time.monotonic() - since < calm_s:
            stats = await self.client.collection_stats(collection)
            now = stats, self.snapshot().cpu_s["builders"]
            if now != last or processes.has_busy_children(self._fleet.pids()["writer"]):
                last, since = now, time.monotonic()
            await asyncio.sleep(_POLL_S)
        return last[0]

    def _note(self, name: str, line: str) -> None:
        self._log.write(f"{json.dumps(name)} {line}\n")
        self._log.flush()
