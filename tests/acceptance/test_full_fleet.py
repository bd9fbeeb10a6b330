"""A whole fleet whose Redis is full for long, and one whose aggregator stands still."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import orjson
import pytest
import redis
from servers import Process, eventually, start_role

from vecfleet.common import keys
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.redis_client import connect, connect_async
from vecfleet.fleet.redis_server import free_port

ROLES = Path(__file__).parents[1] / "roles.py"
STEP_S = 0.3  # for what has 512 tokens; a block here has about as many
DOCUMENTS = 128  # in a body, of two blocks
FILLING_BYTES = 11_000  # of metadata, which costs Redis memory and the engine nothing
NOTHING_LEFT = ("rq:job:*", "rq:queue:*", "rq:wip:*", "rq:failed:*", "vf:lease:*", "vf:parked:*")
DRAIN_S = 90.0


@dataclass
class Fleet:
    """The processes, a client of their gateway and one of their Redis."""

    url: str
    http: httpx.AsyncClient
    redis: redis.Redis
    roles: dict[str, Process]
    start: Callable[[str], None]
    statuses: dict[str, list[int]] = field(default_factory=lambda: {"bulk": [], "query": []})
    refusals: set[str] = field(default_factory=set)
    acknowledged: set[str] = field(default_factory=set)
    attempted: set[str] = field(default_factory=set)
    _number: itertools.count[int] = field(default_factory=itertools.count)

    async def submit(self) -> int:
        """Two MiB of documents; what is acknowledged is noted. Returns the status."""
        first = next(self._number)
        ids = [f"{first}-{n}" for n in range(DOCUMENTS)]
        self.attempted.update(ids)
        rows = [
            {"id": i, "text": f"the text of the document {i} " * 2, "metadata": filling()}
            for i in ids
        ]
        body = orjson.dumps({"documents": rows})
        answer = await self.http.post("/collections/c/documents", content=body)
        if answer.status_code == 202:
            self.acknowledged.update(ids)
        else:
            self.refusals.add(answer.json()["error"]["message"])
        self.statuses["bulk"].append(answer.status_code)
        return answer.status_code

    async def query(self) -> int:
        """The status of a search for a text."""
        answer = await self.http.post("/collections/c/search", json={"query": "what?"})
        self.statuses["query"].append(answer.status_code)
        return answer.status_code

    def used_bytes(self) -> int:
        """What Redis holds."""
        return int(self.redis.info("memory")["used_memory"])

    def left(self) -> list[bytes]:
        """Keys of work that is not done."""
        return [key for pattern in NOTHING_LEFT for key in self.redis.scan_iter(pattern, 1000)]

    async def drained(self) -> None:
        """Wait until nothing is on its way, and compare the index with what was acknowledged."""
        await eventually(lambda: not self.left(), DRAIN_S, "the end of what is on its way")
        async with FleetClient(connect_async(self.url), timeout_s=60) as client:
            collection = await client.collection("c")
            names = sorted(self.attempted)
            found = set()
            for at in range(0, len(names), 256):
                rows = await client.documents(collection, names[at : at + 256])
                found.update(row.id for row in rows if row is not None)

            async def is_read() -> bool:
                stats = await client.collection_stats(collection)
                return stats["documents"] == len(found)

            await eventually(is_read)
        assert found >= self.acknowledged, "acknowledged documents are missing"


def filling() -> dict[str, str]:
    """Metadata that cannot be compressed by much."""
    return {"filling": base64.b64encode(os.urandom(FILLING_BYTES)).decode()}


@pytest.fixture
async def make_fleet(redis_server_factory, tmp_path) -> AsyncIterator[Callable[..., object]]:
    @asynccontextmanager
    async def make(**settings: int) -> AsyncIterator[Fleet]:
        url = redis_server_factory(append_only=False).url
        settings["max_queue_tokens"] = 1 << 30  # bytes are what is tried here
        env = {f"VECFLEET_{name.upper()}": str(value) for name, value in settings.items()}
        port = free_port()
        roles: dict[str, Process] = {}

        def start(role: str) -> None:
            step_s = str(STEP_S if role == "worker" else 0)
            command = [sys.executable, str(ROLES), role, url, str(tmp_path / "data"), step_s]
            roles[role] = Process(command, env=env)

        try:
            for role in ("aggregator", "search", "worker"):
                start(role)
            gateway = ("gateway", "--no-keys", "--port", str(port))
            roles["gateway"] = start_role(*gateway, env={**env, "VECFLEET_REDIS_URL": url})
            for name, process in roles.items():
                line = "gateway listens" if name == "gateway" else f"{name} ready"
                await asyncio.to_thread(process.wait_for_line, line, 60.0)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                with connect(url) as client:
                    fleet = Fleet(url, http, client, roles, start)

                    async def is_made() -> bool:
                        return (await http.put("/collections/c", json={})).status_code < 300

                    await eventually(is_made)
                    assert await fleet.submit() == 202
                    await fleet.drained()
                    yield fleet
        finally:
            for process in roles.values():
                process.close()

    yield make


async def test_a_full_redis_costs_nothing_that_was_acknowledged(make_fleet):
    async with make_fleet() as fleet:
        began = fleet.used_bytes()
        most = began + (16 << 20)
        fleet.redis.config_set("maxmemory", most)
        holds_s = keys.ALIVE_TTL_S + 5
        used: list[int] = []

        async def fill() -> None:
            while time.monotonic() < ends:
                if await fleet.submit() != 202:
                    await asyncio.sleep(0.05)

        async def ask() -> None:
            while time.monotonic() < ends:
                await fleet.query()
                used.append(fleet.used_bytes())
                await asyncio.sleep(0.1)

        ends = time.monotonic() + 60
        filling = asyncio.create_task(fill())
        await eventually(lambda: any("Redis" in said for said in fleet.refusals), 60)
        ends = time.monotonic() + holds_s
        await asyncio.gather(filling, ask())

        assert set(fleet.statuses["bulk"]) == {202, 429}
        assert set(fleet.statuses["query"]) <= {200, 429}, "a query met something else"
        assert sorted(used)[len(used) // 2] > began + (10 << 20), "Redis was not full for long"
        assert len(fleet.acknowledged) > 5 * DOCUMENTS

        await fleet.drained()
        assert fleet.redis.config_get("maxmemory")["maxmemory"] == str(most)
        for _ in range(5):
            assert await fleet.query() == 200
        assert await fleet.submit() == 202
        await fleet.drained()
        await eventually(lambda: fleet.used_bytes() < began + (3 << 20), what="memory given back")


async def test_an_aggregator_that_stands_still_stops_bulk_and_nothing_else(make_fleet):
    async with make_fleet(max_merge_bytes=4 << 20, max_queue_bytes=16 << 20) as fleet:
        began = fleet.used_bytes()
        fleet.roles["aggregator"].signal(signal.SIGSTOP)

        async def is_refused() -> bool:
            return await fleet.submit() == 429 and any("merged" in s for s in fleet.refusals)

        def is_parked() -> bool:
            (load,) = fleet.redis.keys("vf:load:vf.*.merge.*")
            return int(fleet.redis.hget(load, "parked_jobs") or 0) > 0

        refused = asyncio.create_task(eventually(is_refused, 60, "a refusal"))
        while not refused.done():
            assert await fleet.query() == 200
            await asyncio.sleep(STEP_S)  # bulk has its turn when nobody asks
        await refused
        await eventually(is_parked, what="parked blocks")
        for _ in range(5):
            assert await fleet.query() == 200
            assert await fleet.submit() == 429
        assert set(fleet.statuses["bulk"]) == {202, 429}
        assert fleet.used_bytes() < began + (40 << 20)

        fleet.roles["aggregator"].signal(signal.SIGCONT)
        try:
            await fleet.drained()
        except AssertionError:
            if fleet.roles["aggregator"].running():
                raise
            fleet.start("aggregator")  # its lease was another's; whoever runs it starts it again
            await fleet.drained()
        await eventually(lambda: fleet.used_bytes() < began + (3 << 20), what="memory given back")
