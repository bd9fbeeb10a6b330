"""The gateway's process: from a config to an exit code."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import uvicorn
import uvloop

from vecfleet.common.errors import ConfigError, RedisUnavailable, Unavailable, VecfleetError
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.open_files import allow_files
from vecfleet.common.redis_client import connect_async
from vecfleet.gateway.app import create_app
from vecfleet.gateway.certificate import follow_certificate
from vecfleet.gateway.config import GatewayConfig, is_loopback
from vecfleet.gateway.protocol import protocol_class

log = logging.getLogger(__name__)

_BACKLOG = 2048
_UNSENT_BYTES = 128 << 10  # that the system takes of an answer before it can send them
_RETRY_S = 0.5
_TRY_AGAIN = 3  # as all commands say it
_OTHER_FILES = 256  # that are open beside connections: libraries, Redis, the log
_FEWEST_CONNECTIONS = 16


def run_gateway(config: GatewayConfig) -> int:
    """Serve until SIGTERM or SIGINT, let requests in flight finish, and return an exit code.

    0 after a signal; 3 when Redis was away at the start, 1 when that failed otherwise, with the
    reason in the log.
    """
    try:
        config.checked()
        most = _allow_connections(config.limits.max_connections)
        config = replace(config, limits=replace(config.limits, max_connections=most))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(config))
    except (VecfleetError, OSError) as error:
        log.error("the gateway cannot run: %s", error)
        return _TRY_AGAIN if isinstance(error, Unavailable) else 1
    return 0


async def serve(
    config: GatewayConfig,
    listener: socket.socket | None = None,
    stop: asyncio.Event | None = None,
) -> None:
    """Serve on ``listener``, by default the config's host and port, until a signal or ``stop``."""
    fleet = FleetClient(
        connect_async(config.redis_url), admission=config.admission, timeout_s=config.timeout_s
    )
    await _wait_for_redis(fleet, config.redis_wait_s)

    @asynccontextmanager
    async def opened() -> AsyncIterator[None]:
        async with fleet:
            yield

    app = create_app(fleet, config, opened)
    listener = listener or _listen(config.host, config.port)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # of its connections; so it is seen when clients read
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
    listener.listen(_BACKLOG)  # whoever reads the line below may come at once
    settings = uvicorn.Config(
        app,
        ssl_certfile=config.tls_cert,
        ssl_keyfile=config.tls_key,
        loop="none",
        http=protocol_class(config.limits),
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        limit_concurrency=config.limits.max_connections,
        timeout_keep_alive=int(config.limits.idle_timeout_s),
        timeout_graceful_shutdown=max(1, int(config.drain_s)),
    )
    _load_tls(settings)
    host, port = listener.getsockname()[:2]
    log.info("gateway listens on %s://%s:%s", "https" if settings.is_ssl else "http", host, port)
    if config.keys_file is None:
        level = logging.INFO if is_loopback(config.host) else logging.WARNING
        log.log(level, "no API keys are asked for: whoever reaches this may do everything")
    server = _Server(settings)
    beside = [asyncio.create_task(_stop(server, stop))] if stop is not None else []
    if settings.ssl is not None and config.tls_cert is not None and config.tls_key is not None:
        following = follow_certificate(settings.ssl, config.tls_cert, config.tls_key)
        beside.append(asyncio.create_task(following))
    try:
        await server.serve(sockets=[listener])
    except SystemExit as error:  # uvicorn's way to say that the lifespan failed
        raise Unavailable("the gateway could not start; the lines above say why") from error
    finally:
        for task in beside:
            task.cancel()
    log.info("gateway has stopped")


async def _stop(server: uvicorn.Server, stop: asyncio.Event) -> None:
    await stop.wait()
    server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn's server, which would raise the signal again once it has drained."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


def _allow_connections(wanted: int) -> int:
    """Have the system allow so many connections; returns how many it does allow."""
    files = allow_files(wanted + _OTHER_FILES)
    if files is None or files >= wanted + _OTHER_FILES:
        return wanted
    allowed = max(_FEWEST_CONNECTIONS, files - _OTHER_FILES)
    log.warning(
        "at most %d connections at a time, not %d: this process may open %d files (ulimit -n)",
        *(allowed, wanted, files),
    )
    return allowed


def _load_tls(settings: uvicorn.Config) -> None:
    """Raise ``ConfigError`` for a certificate or key that cannot be used."""
    try:
        settings.load()
    except OSError as error:  # ssl.SSLError is one
        what = f"{settings.ssl_certfile} and {settings.ssl_keyfile}"
        raise ConfigError(f"the TLS files {what} cannot be used: {error}") from error


async def _wait_for_redis(fleet: FleetClient, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            await fleet.models()
            return
        except RedisUnavailable as error:
            if time.monotonic() >= deadline:
                raise
            log.warning("waiting for Redis: %s", error)
        await asyncio.sleep(_RETRY_S)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener
