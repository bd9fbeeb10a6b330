"""A whole fleet of real processes on a real Redis, behind a proxy, in one folder."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from chaos.launch import Order
from chaos.proxy import Proxy
from chaos.roles import Nursery, Slot

from vecfleet.common.errors import VecfleetError
from vecfleet.fleet.redis_server import (
    RedisAddress,
    RedisBinary,
    RedisServer,
    find_redis_server,
    free_port,
)
from vecfleet.producer.sync_producer import Producer

Persistence = Literal["always", "everysec", "none"]
MODEL = "chaos"
ASSIGNED, GIVEN = "news", "ledger"  # collections, by who says the versions
_DISK_BYTES = 192 << 20
_FULL_S = 30.0
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Plan:
    """What a fleet consists of."""

    seed: int = 1
    lease_s: float = 1.0  # 0: as in production
    persistence: Persistence = "always"
    workers: int = 3
    aggregators: int = 2  # one works, the others wait
    gateways: int = 1
    producers: int = 2
    http_clients: int = 2
    operations: int = 0  # of each client; 0: until it is told to stop
    pause_s: float = 0.05  # between a client's operations
    until: str = "accepted"  # what an HTTP client takes for an acknowledgement
    deletes: bool = True  # a lost deletion is noticed after 30 s: too long for a short test
    step_s: float = 0.01
    mutants: tuple[tuple[str, str], ...] = ()  # (role, name)
    small_disk: bool = False
    given_share: bool = True  # half of the clients write where versions are given


class Fleet:
    """Use it as a context manager: it is started, and gone afterwards."""

    def __init__(self, folder: Path, plan: Plan, binary: RedisBinary | None = None) -> None:
        self.folder = folder
        self.plan = plan
        self.slots: dict[str, Slot] = {}
        self.restarts = 0
        self._binary = binary or find_redis_server()
        self._closers = contextlib.ExitStack()
        self.disk_kind = ""

    def __enter__(self) -> Fleet:
        try:
            self._open()
        except BaseException:
            self._closers.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._closers.close()

    # What it consists of

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = self.folder / "data"
        self.data.mkdir(exist_ok=True)
        if self.plan.small_disk:
            self._closers.callback(self._mount())
        self.server = self._redis()
        self._closers.callback(self.server.kill)
        self.proxy = Proxy(self.server.address.port, self.plan.seed)
        self._closers.callback(self.proxy.close)
        self.url = f"redis://127.0.0.1:{self.proxy.port}/0"
        self.nursery = Nursery(self.plan.lease_s, self.folder / "nursery.log")
        self._closers.callback(self.nursery.close)
        self.redis = self.server.client()
        self._closers.callback(self.redis.close)
        self._add_roles()
        for slot in self.slots.values():
            slot.start()
        self._make_collections()
        for slot in self._clients():
            self.slots[slot.name] = slot
            slot.start()

    def _redis(self) -> RedisServer:
        persistence = self.plan.persistence
        extra = ["--appendfsync", persistence] if persistence != "none" else []
        server = RedisServer(
            self.folder / "redis",
            binary=self._binary,
            address=RedisAddress(port=free_port()),
            append_only=persistence != "none",
            extra=extra,
        )
        return server.start()

    def _add_roles(self) -> None:
        plan = self.plan
        common = ("--redis", self.url)
        engine = ("--engine", "fake", "--served-name", MODEL, "--niceness", "0")
        for n in range(plan.workers):
            name = f"worker{n}"
            self._add(name, "worker", "worker", *common, *engine, "--name", f"{name}-{{life}}")
        data = ("--data", str(self.data))
        for n in range(plan.aggregators):
            only = ("--only", "writer", "--niceness", "0")
            self._add(f"aggregator{n}", "aggregator", "aggregator", *common, *data, *only)
        self._add("search", "search", "aggregator", *common, *data, "--only", "search")
        self.ports = [free_port() for _ in range(plan.gateways)]
        for n, port in enumerate(self.ports):
            listen = ("--host", "127.0.0.1", "--port", str(port), "--no-keys")
            self._add(f"gateway{n}", "gateway", "gateway", *common, *listen)

    def _add(self, name: str, role: str, *arguments: str) -> None:
        self.slots[name] = self._slot(name, role, *arguments)

    def _slot(self, name: str, role: str, *arguments: str) -> Slot:
        order = Order(
            arguments,
            log=str(self.folder / f"{name}.log"),
            notes=role in ("worker", "aggregator"),
            step_s=self.plan.step_s if role == "worker" else 0.0,
            mutant=dict(self.plan.mutants).get(role, ""),
            disk_full=str(self.folder / "disk-full") if role == "aggregator" else "",
        )
        return Slot(name, role, order, self.nursery)

    def _clients(self) -> Iterator[Slot]:
        plan = self.plan
        kinds = [("producer", n) for n in range(plan.producers)]
        kinds += [("http", n) for n in range(plan.http_clients)]
        for kind, n in kinds:
            versions = "given" if plan.given_share and n % 2 else "assigned"
            name = f"{kind}{n}"
            url = self.url
            if kind == "http":
                url = f"http://127.0.0.1:{self.ports[n % len(self.ports)]}"
            arguments = {
                "url": url,
                "name": name,
                "collection": GIVEN if versions == "given" else ASSIGNED,
                "versions": versions,
                "ledger": self.folder / f"{name}.ledger",
                "seed": plan.seed,
                "operations": plan.operations,
                "pause": plan.pause_s,
                "until": plan.until,
                "deletes": "yes" if plan.deletes and kind == "producer" else "no",
            }
            words = [w for k, v in arguments.items() for w in (f"--{k}", str(v))]
            role = "producer" if kind == "producer" else "http"
            yield self._slot(name, role, "client", kind, *words)

    def _make_collections(self) -> None:
        with Producer(self.server.url, timeout_s=10.0) as producer:
            for name, versions in ((ASSIGNED, "assigned"), (GIVEN, "given")):
                self._until(
                    lambda name=name, versions=versions: producer.create_collection(
                        name, model=MODEL, versions=versions
                    )
                )
            self._until(lambda: producer.search(ASSIGNED, vector=[1.0] * 32) == [])

    def _until(self, call: Callable[[], object]) -> None:
        end = time.monotonic() + _FULL_S
        while True:
            try:
                call()
                return
            except VecfleetError:
                if time.monotonic() > end:
                    raise
                time.sleep(_POLL_S)

    # Keeping it up

    def of(self, *roles: str) -> list[Slot]:
        """The slots of some roles."""
        return [slot for slot in self.slots.values() if slot.role in roles]

    def tend(self) -> list[Slot]:
        """Start again what has died; the slots that had. A client that is done stays so."""
        died = []
        for slot in self.slots.values():
            if not slot.is_wanted or slot.running():
                continue
            died.append(slot)
            is_client = slot.role in ("producer", "http")
            if is_client and slot.codes and slot.codes[-1] == 0:
                slot.is_wanted = False
            else:
                slot.start()
                self.restarts += 1
        return died

    def ledgers(self) -> list[Path]:
        """The files of what was acknowledged."""
        return sorted(self.folder.glob("*.ledger"))

    # Faults of what is not a process of the product

    def restart_redis(self, *, wait_s: float = 0.0, lose: Callable[[], None] | None = None) -> None:
        """kill -9, and start again; ``lose`` may damage its files in between."""
        self.server.kill()
        if lose is not None:
            lose()
        time.sleep(wait_s)
        self.server.start()

    def fill_redis(self) -> None:
        """From now on it refuses whatever needs memory."""
        used: Any = self.redis.info("memory")
        self.redis.config_set("maxmemory", max(1, int(used["used_memory"])))

    def empty_redis(self) -> None:
        """There is room again."""
        self.redis.config_set("maxmemory", 0)

    def _mount(self) -> Callable[[], None]:
        """A small disk of its own where we may mount one; else a writer that meets a full one."""
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(self.data)]
        if shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
            self.disk_kind = "tmpfs"
            return lambda: subprocess.run(["umount", "-l", str(self.data)], check=False)  # type: ignore[return-value]
        self.disk_kind = "patched write"
        return lambda: None

    def fill_disk(self) -> None:
        """Nothing more fits on the index's disk."""
        if self.disk_kind != "tmpfs":
            (self.folder / "disk-full").touch()
            return
        with contextlib.suppress(OSError), (self.data / "filler").open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    def empty_disk(self) -> None:
        """There is room again."""
        (self.folder / "disk-full").unlink(missing_ok=True)
        (self.data / "filler").unlink(missing_ok=True)


def with_mutant(plan: Plan, name: str) -> Plan:
    """``plan`` with a mutant in the roles that it concerns."""
    roles = ("worker", "aggregator") if name == "no_fence" else ("aggregator",)
    return replace(plan, mutants=tuple((role, name) for role in roles))


def write_json(path: Path, value: object) -> None:
    """For people who look at a run afterwards."""
    path.write_text(json.dumps(value, indent=1, default=str))
