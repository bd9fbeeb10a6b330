"""A whole fleet of real processes on a real Redis, behind a proxy, in one folder."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from chaos.asker import GATEWAY_TIMEOUT_S
from chaos.launch import Order
from chaos.power import MOST_LOST_S, Growth, PowerCut, power_cut
from chaos.proxy import Proxy
from chaos.roles import Nursery, Slot

from vecfleet.common.api_keys import add_key, new_key
from vecfleet.common.errors import VecfleetError
from vecfleet.common.keys import DEFAULT_TENANT
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
_PAUSES = {"poison": 10, "keeper": 10, "asker": 2}  # so many times as long as the others'
_DISK_BYTES = 192 << 20
_FULL_S = 30.0
_SEEN_LATE_S = 2.0  # an answer may be on its way for so long, and come when Redis is dead
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
    poisoners: int = 0  # clients that send what the engine cannot do
    keepers: int = 0  # clients that create and delete collections
    askers: int = 0  # clients that wait for vectors and hits
    cancels: bool = False  # whether HTTP clients cancel some of what they send
    tenants: tuple[str, ...] = ()  # besides the default one; the gateway asks for keys then
    skew_h: float = 0.0  # so far, at most, wall clocks are wrong in some processes
    max_merge_bytes: int = 0  # blocks wait while more waits to be merged; 0: as in production
    max_step_s: float = 0.0  # a worker whose engine does nothing for longer ends; 0: likewise


def with_everything(plan: Plan) -> Plan:
    """``plan`` with all that a fleet meets besides plain writes."""
    return replace(
        plan,
        poisoners=1,
        keepers=1,
        askers=1,
        cancels=True,
        tenants=("red", "blue"),
        skew_h=30.0,
        max_merge_bytes=6_000,
        max_step_s=4.0,
    )


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
        self.cuts: list[PowerCut] = []  # restarts of a Redis that may lose what it had

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
        self._growth = Growth(self.server)
        if self.plan.persistence == "everysec":
            self._closers.callback(self._growth.start().stop)
        self.proxy = Proxy(self.server.address.port, self.plan.seed)
        self._closers.callback(self.proxy.close)
        self.url = f"redis://127.0.0.1:{self.proxy.port}/0"
        self.nursery = Nursery(self.plan.lease_s, self.folder / "nursery.log", self._settings())
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
            listen = ("--host", "127.0.0.1", "--port", str(port))
            keys = () if plan.tenants else ("--no-keys",)
            self._add(f"gateway{n}", "gateway", "gateway", *common, *listen, *keys)

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
            skew_s=self._skew_s(name) if role not in ("producer", "http") else 0.0,
        )
        return Slot(name, role, order, self.nursery)

    def _settings(self) -> dict[str, str]:
        """What the roles find in their environment."""
        plan = self.plan
        settings = {"VECFLEET_TIMEOUT_S": str(GATEWAY_TIMEOUT_S)} if plan.askers else {}
        if plan.max_merge_bytes:
            settings["VECFLEET_MAX_MERGE_BYTES"] = str(plan.max_merge_bytes)
        if plan.max_step_s:
            settings["VECFLEET_MAX_STEP_S"] = str(plan.max_step_s)
        self._keys = dict.fromkeys(self.tenants, "")
        if plan.tenants:
            path = self.folder / "keys.json"
            for tenant in self._keys:
                self._keys[tenant], entry = new_key(tenant)
                add_key(path, entry)
            settings["VECFLEET_KEYS_FILE"] = str(path)
        return settings

    @property
    def tenants(self) -> tuple[str, ...]:
        """All that have collections."""
        return (DEFAULT_TENANT, *self.plan.tenants)

    def _skew_s(self, name: str) -> float:
        """How wrong the clock of a process is: the first of a kind is right."""
        chance = random.Random(f"skew/{self.plan.seed}/{name}")
        hours = chance.uniform(-self.plan.skew_h, self.plan.skew_h)
        return 0.0 if name.endswith("0") and name != "gateway0" else 3600 * hours

    def _clients(self) -> Iterator[Slot]:
        plan = self.plan
        for kind, count in (
            ("producer", plan.producers),
            ("http", plan.http_clients),
            ("poison", plan.poisoners),
            ("keeper", plan.keepers),
            ("asker", plan.askers),
        ):
            for n in range(count):
                is_given = plan.given_share and n % 2 == 1
                yield self._client(kind, n, GIVEN if is_given else ASSIGNED, is_given=is_given)
        for n, tenant in enumerate(plan.tenants):
            # By turns through Redis and through the gateway.
            kind, count = (("http", plan.http_clients), ("producer", plan.producers))[n % 2]
            yield self._client(kind, count + n, f"{tenant}-news", tenant)

    def _client(
        self,
        kind: str,
        n: int,
        collection: str,
        tenant: str = DEFAULT_TENANT,
        *,
        is_given: bool = False,
    ) -> Slot:
        plan, name = self.plan, f"{kind}{n}"
        url = f"http://127.0.0.1:{self.ports[n % len(self.ports)]}"
        arguments = {
            "url": self.url if kind == "producer" else url,
            "name": name,
            "collection": collection,
            "tenant": tenant,
            "key": self._keys[tenant],
            "versions": "given" if is_given else "assigned",
            "ledger": self.folder / f"{name}.ledger",
            "seed": plan.seed,
            "operations": plan.operations,
            "pause": plan.pause_s * _PAUSES.get(kind, 1),
            "until": plan.until,
            # A producer whose deletion is lost with Redis's data notices it after 30 s only.
            "deletes": "yes" if plan.deletes or kind == "http" else "no",
            "cancels": "yes" if plan.cancels else "no",
        }
        words = [f"--{k}={v}" for k, v in arguments.items()]
        role = "producer" if kind == "producer" else "http"
        return self._slot(name, role, "client", kind, *words)

    def _make_collections(self) -> None:
        for tenant in self.tenants:
            with Producer(self.server.url, tenant=tenant, timeout_s=10.0) as producer:
                wanted = {ASSIGNED: "assigned", GIVEN: "given"}
                if tenant != DEFAULT_TENANT:
                    wanted = {f"{tenant}-news": "assigned"}
                for name, versions in wanted.items():
                    self._until(
                        lambda name=name, versions=versions, producer=producer: (
                            producer.create_collection(name, model=MODEL, versions=versions)
                        )
                    )
                first = next(iter(wanted))
                self._until(
                    lambda first=first, producer=producer: (
                        producer.search(first, vector=[1.0] * 32) == []
                    )
                )

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

    def may_be_lost(self, at_s: float) -> bool:
        """Whether Redis may have lost its account of what was acknowledged then."""
        all_of_it = self.plan.persistence == "none"
        return any(
            at_s <= cut.at_s + _SEEN_LATE_S and (all_of_it or at_s > cut.at_s - MOST_LOST_S)
            for cut in self.cuts
        )

    # Faults of what is not a process of the product

    def restart_redis(self, *, wait_s: float = 0.0, cut: bool | None = None) -> PowerCut | None:
        """kill -9, and start again; what was lost, where Redis may lose something.

        ``cut``: the end of its file goes as well, as in a power cut; by default with ``everysec``.
        """
        if cut is None:
            cut = self.plan.persistence == "everysec"
        self.server.kill()
        killed_s = time.monotonic()
        if cut:
            self._growth.cut_off_the_last_second(killed_s)
        time.sleep(wait_s)
        if self.plan.persistence == "always":
            self.server.start()
            return None
        # Nobody mends anything before we have looked.
        with self.proxy.shut():
            self.server.start()
            if cut:  # what a start leaves in the file must not come back at the next
                self.server.kill()
                self.server.start()
            self.cuts.append(power_cut(self.redis, self.ledgers(), killed_s))
        return self.cuts[-1]

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
