"""A fleet without a gateway: Redis, the index's two processes and one worker."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vecfleet.bench.child import Child
from vecfleet.common.errors import (
    DeadlineExceeded,
    EngineFailed,
    NoWorker,
    UnknownModel,
    VecfleetError,
)
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.redis_client import connect_async
from vecfleet.common.settings import Settings
from vecfleet.fleet.engine_options import engine_arguments
from vecfleet.fleet.process import role_command
from vecfleet.fleet.redis_server import RedisServer
from vecfleet.fleet.supervisor import ChildSpec, Supervisor

MODEL = "bench"  # how the fleet calls its model
_POLL_S = 0.1


class GpuFleet:
    """The roles as the ``vecfleet`` command runs them, with data in a folder of their own."""

    def __init__(self, settings: Settings) -> None:
        """``settings`` name the data folder, the model and the engine."""
        self._settings = settings
        self._log = (settings.data / "fleet.log").open("a")
        self._redis = RedisServer(settings.data / "redis")
        self._supervisor = Supervisor(self._note)
        self._stack = AsyncExitStack()
        self.client: FleetClient

    async def __aenter__(self) -> Self:
        self._stack.callback(self._log.close)
        self._stack.callback(self._redis.stop)
        self._stack.push_async_callback(self._supervisor.stop)
        try:
            await asyncio.to_thread(self._redis.start)
            client = FleetClient(connect_async(self._redis.url))
            self.client = await self._stack.enter_async_context(client)
            await self._start_roles()
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

    def feeder(self, texts: Path) -> Child:
        """A producer's process for this fleet."""
        return Child("feeder", self._settings.data / "feeder.log", self._redis.url, str(texts))

    async def _start_roles(self) -> None:
        data = ("--data", str(self._settings.data))
        named = ("--model", self._settings.model, "--served-name", MODEL)
        self._supervisor.start(
            self._role("search", "aggregator", *data, "--only", "search"),
            self._role("writer", "aggregator", *data, "--only", "writer"),
            self._role("worker", "worker", *named, *engine_arguments(self._settings)),
        )
        failure = asyncio.create_task(self._supervisor.failure())
        ready = asyncio.create_task(self._until_ready())
        try:
            await asyncio.wait((failure, ready), return_when=asyncio.FIRST_COMPLETED)
            if failure.done():
                raise self._failed(failure.result())
            await ready
        finally:
            failure.cancel()
            ready.cancel()
        self._supervisor.settled()

    async def _until_ready(self) -> None:
        while True:
            with suppress(NoWorker, UnknownModel, DeadlineExceeded):
                await self.client.find_model(MODEL, "embed")
                await self.client.create_collection("ready", model=MODEL)
                await self.client.delete_collection("ready")
                return
            await asyncio.sleep(_POLL_S)

    def _role(self, name: str, *arguments: str) -> ChildSpec:
        return ChildSpec(
            name,
            tuple(role_command("--log-format", "json", *arguments)),
            environment=self._settings.environment(
                # Whatever else runs here: no worker shall pause.
                redis_url=self._redis.url,
                max_cpu_percent="100",
                max_memory_percent="100",
            ),
        )

    def _failed(self, error: VecfleetError) -> EngineFailed:
        tail = (self._settings.data / "fleet.log").read_text(errors="replace")[-2500:]
        return EngineFailed(f"{error.message}\n{tail}")

    def _note(self, name: str, line: str) -> None:
        self._log.write(f"{name} {line}\n")
        self._log.flush()


def fleet_settings(data: Path, model: Path, **engine: Any) -> Settings:
    """Settings of a fleet with ``model``; the folder is made."""
    data.mkdir()
    given = {name: value for name, value in engine.items() if value is not None}
    return Settings.checked({"data": data, "model": str(model), **given})
