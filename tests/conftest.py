"""Fixtures for every test: real Redis servers, and processes that are gone after the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import redis.asyncio
from servers import Process, redis_binaries, require_or_skip, start_role

from vecfleet.common import redis_client
from vecfleet.common.redis_client import connect_async
from vecfleet.fleet.redis_server import RedisBinary, RedisServer

REDIS_BINARIES = redis_binaries()
redis_client.CONNECT_TIMEOUT_S = 30.0  # a machine that stands still is no Redis that is away
RedisServerFactory = Callable[..., RedisServer]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``each_redis_binary`` runs once with each Redis version there is."""
    if "each_redis_binary" in metafunc.fixturenames:
        metafunc.parametrize(
            "each_redis_binary",
            REDIS_BINARIES or [None],
            ids=[".".join(map(str, b.version[:2])) for b in REDIS_BINARIES] or ["none"],
            indirect=True,
        )


@pytest.fixture
def each_redis_binary(request: pytest.FixtureRequest) -> RedisBinary:
    require_or_skip(request.param, "redis-server")
    return request.param


@pytest.fixture(scope="session")
def redis_binary() -> RedisBinary:
    """The newest redis-server there is."""
    require_or_skip(REDIS_BINARIES, "redis-server")
    return REDIS_BINARIES[0]


@pytest.fixture(scope="session")
def _session_redis(
    redis_binary: RedisBinary, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer]:
    # One server a pytest process, and so one for each xdist worker.
    folder = tmp_path_factory.mktemp("redis")
    with RedisServer(folder, binary=redis_binary, append_only=False) as server:
        yield server


@pytest.fixture
def redis_server(_session_redis: RedisServer) -> RedisServer:
    """The session's Redis, empty; do not stop it: ``redis_server_factory`` makes ones to stop."""
    with _session_redis.client() as client:
        client.flushall()
        client.config_resetstat()
        client.script_flush()
    return _session_redis


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of an empty Redis."""
    return redis_server.url


@pytest.fixture
async def redis_async(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    """A client of an empty Redis, for the test's event loop."""
    async with connect_async(redis_url) as client:
        yield client


@pytest.fixture
def redis_server_factory(
    tmp_path_factory: pytest.TempPathFactory, redis_binary: RedisBinary
) -> Iterator[RedisServerFactory]:
    """Make Redis servers that the test may stop, kill and start again.

    ``factory(data_dir=None, binary=None, append_only=True, extra=[...])`` returns a started one.
    """
    servers: list[RedisServer] = []

    def make(
        data_dir: Path | None = None,
        *,
        binary: RedisBinary | None = None,
        append_only: bool = True,
        extra: tuple[str, ...] | list[str] = (),
    ) -> RedisServer:
        server = RedisServer(
            data_dir or tmp_path_factory.mktemp("redis"),
            binary=binary or redis_binary,
            append_only=append_only,
            extra=extra,
        )
        servers.append(server)
        return server.start()

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def run_role() -> Iterator[Callable[..., Process]]:
    """Start ``vecfleet ARGUMENTS...`` processes; those that still run at the end are killed."""
    started: list[Process] = []

    def start(*arguments: str, **options: object) -> Process:
        process = start_role(*arguments, **options)  # type: ignore[arg-type]
        started.append(process)
        return process

    yield start
    for process in started:
        process.close()
