"""A power cut, played: SIGKILL leaves what was written, so the file's end is cut off as well."""

from __future__ import annotations

from pathlib import Path

from vecfleet.fleet.redis_server import RedisServer

LOST_BYTES = 20_000
"""About what a second of a test's traffic comes to; a record that is cut in two is part of it."""


def append_only_file(server: RedisServer) -> Path:
    """The file that grows: of Redis 6.2, or the last increment of Redis 7."""
    single = server.data_dir / "appendonly.aof"
    increments = sorted(
        (server.data_dir / "appendonlydir").glob("*.incr.aof"),
        key=lambda path: int(path.name.split(".")[-3]),
    )
    return increments[-1] if increments else single


def cut_off_the_last_second(server: RedisServer, lost_bytes: int = LOST_BYTES) -> None:
    """Between the death of Redis and its start: what it wrote last never reached the disk."""
    path = append_only_file(server)
    with path.open("r+b") as file:
        file.truncate(max(0, path.stat().st_size - lost_bytes))
