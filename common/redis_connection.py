"""Connections of an event loop that keep a cancellation, and whose end is no failure.

redis-py writes with ``asyncio.wait_for``, which on Python 3.11 loses a cancellation that comes as
the write ends (https://github.com/python/cpython/issues/86296): the task goes on, and whoever
awaits its end waits for ever. It also makes a task for each command. And a connection that takes
longer to close than one may take to open raises, after all the work is done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import redis
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    SSLConnection,
    UnixDomainSocketConnection,
)


class _Cancellable(AbstractConnection):
    async def send_packed_command(
        self, command: bytes | str | Iterable[bytes], check_health: bool = True
    ) -> None:
        if not self.is_connected:
            await self.connect_check_health(check_health=False)
        if check_health:
            await self.check_health()  # type: ignore[no-untyped-call]
        limit_s, self.socket_timeout = self.socket_timeout, None
        try:
            async with asyncio.timeout(limit_s):
                await super().send_packed_command(command, check_health=False)
        except TimeoutError:
            raise redis.exceptions.TimeoutError("Timeout writing to socket") from None
        except RuntimeError as error:
            # uvloop's word for a connection that was cut before we wrote.
            raise redis.exceptions.ConnectionError(f"writing to socket: {error}") from error
        finally:
            self.socket_timeout = limit_s

    async def disconnect(self, *args: Any, **kwargs: Any) -> None:
        with suppress(redis.exceptions.TimeoutError):  # the socket is let go all the same
            await super().disconnect(*args, **kwargs)


class _TcpConnection(_Cancellable, Connection): ...


class _TlsConnection(_Cancellable, SSLConnection): ...


class _UnixConnection(_Cancellable, UnixDomainSocketConnection): ...


_CLASSES: dict[type[Any], type[AbstractConnection]] = {
    Connection: _TcpConnection,
    SSLConnection: _TlsConnection,
    UnixDomainSocketConnection: _UnixConnection,
}


def make_cancellable(pool: redis.asyncio.ConnectionPool) -> None:
    """Let a pool that has no connection yet make such ones."""
    pool.connection_class = _CLASSES[pool.connection_class]
