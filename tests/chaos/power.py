"""A power cut, played: SIGKILL leaves what was written, so the file's end is cut off as well.

Where the cut goes through a transaction, Redis 7.0 loads the file without it, but leaves its first
commands in the file, and at the next start but one carries these out. ``redis-check-aof --fix``
takes them away before the start; so does this.
"""

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
    raw = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(whole_bytes(raw[: max(0, len(raw) - lost_bytes)]))


def whole_bytes(raw: bytes) -> int:
    """How many bytes of an append-only file are whole commands and whole transactions."""
    at = whole = 0
    in_transaction = False
    while (end := _command_end(raw, at)) > 0:
        # MULTI and EXEC stand alone in their commands.
        name = raw[at:end].split(b"\r\n", 3)[2].upper() if raw[at : at + 1] == b"*" else b""
        if name == b"MULTI":
            in_transaction = True
        elif name == b"EXEC":
            in_transaction = False
        at = end
        if not in_transaction:
            whole = at
    return whole


def _command_end(raw: bytes, at: int) -> int:
    """Where the command that begins at ``at`` ends; 0 where it is not whole."""
    line = raw.find(b"\n", at)
    if line < 0:
        return 0
    if raw[at : at + 1] != b"*":  # a note such as #TS:
        return line + 1
    words = int(raw[at + 1 : line])
    at = line + 1
    for _ in range(words):
        line = raw.find(b"\n", at)
        if line < 0:
            return 0
        at = line + 1 + int(raw[at + 1 : line]) + 2
        if at > len(raw):
            return 0
    return at
