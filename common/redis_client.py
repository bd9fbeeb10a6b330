"""Connections to Redis, and the edge where redis-py's errors become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.driver_info import DriverInfo
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from vecfleet.common.errors import (
    ConfigError,
    QueueFull,
    RedisUnavailable,
    Unavailable,
    VecfleetError,
)
from vecfleet.common.redis_connection import make_cancellable
from vecfleet.common.settings import redact_url

CONNECT_TIMEOUT_S = 3.0
SOCKET_TIMEOUT_S = 30.0
MAX_CONNECTIONS = 32  # of one event loop; further calls wait for one


def _options(**extra: Any) -> dict[str, Any]:
    # No retries below us: a claim or an enqueue whose reply was lost must not be sent twice
    # without its sender knowing (one lost reply orphaned half the claims when redis-py retried).
    return {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": SOCKET_TIMEOUT_S,
        "health_check_interval": 0,
        # What a connection would ask for at its start, and no role's user may: which library this
        # is, and notices that only Redis's cloud gives.
        "driver_info": DriverInfo(name=None, lib_version=None),
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
        **extra,
    }


def connect(url: str) -> redis.Redis:
    """A client for threads; opens nothing before its first command."""
    try:
        return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), **_options())
    except ValueError as error:
        raise ConfigError(f"redis URL {redact_url(url)!r}: {error}") from error


def connect_async(url: str) -> redis.asyncio.Redis:
    """A client for an event loop; opens nothing before its first command."""
    try:
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=SOCKET_TIMEOUT_S,
            retry=redis.asyncio.retry.Retry(NoBackoff(), 0),
            **_options(),
        )
        make_cancellable(pool)
        return redis.asyncio.Redis.from_pool(pool)
    except ValueError as error:
        raise ConfigError(f"redis URL {redact_url(url)!r}: {error}") from error


# What a Redis says that is about to be a primary again, or has lost its replicas.
_PASSING = ("READONLY", "NOREPLICAS", "UNBLOCKED", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY")


@contextmanager
def translated() -> Iterator[None]:
    """Turn what redis-py raises into vecfleet's errors."""
    try:
        yield
    except VecfleetError:
        raise
    except redis.exceptions.OutOfMemoryError as error:
        raise QueueFull("Redis is full; try again later", retry_after_s=5.0) from error
    except redis.exceptions.AuthenticationError as error:
        raise _said(ConfigError("Redis refused the credentials"), error) from error
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
        raise _said(RedisUnavailable(retry_after_s=2.0), error) from error
    except redis.exceptions.BusyLoadingError as error:
        raise RedisUnavailable("Redis is loading its data", retry_after_s=2.0) from error
    except redis.exceptions.NoPermissionError as error:
        if isinstance(error.__context__, redis.exceptions.NoScriptError):
            raise Unavailable(
                "no worker has given Redis the fleet's scripts yet, and this user may not",
                retry_after_s=2.0,
            ) from error
        raise _said(ConfigError("this Redis user may not do that"), error) from error
    except redis.exceptions.ResponseError as error:
        # Redis 6.2 reports a refusal inside a script as an error of that script.
        if any(word in str(error) for word in ("OOM command", "MISCONF")):
            raise QueueFull("Redis refuses writes; try again later", retry_after_s=5.0) from error
        if any(word in str(error) for word in _PASSING):
            refused = RedisUnavailable("Redis refuses for now", retry_after_s=2.0)
            raise _said(refused, error) from error
        raise _said(VecfleetError("Redis refused a command"), error) from error
    except redis.exceptions.RedisError as error:
        raise _said(VecfleetError("Redis failed"), error) from error


def _said(ours: VecfleetError, error: Exception) -> VecfleetError:
    """``ours``, whose ``str``, for logs and operators, has Redis's words; ``message`` has not."""
    ours.args = (f"{ours.message.removesuffix('.')} ({error})",)
    return ours


def read_lua(directory: Path, *names: str) -> str:
    """The scripts ``names`` of one folder, one after the other."""
    return "\n".join((directory / f"{name}.lua").read_text() for name in names)
