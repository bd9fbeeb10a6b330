"""``python -m vecfleet.bench.soak``: a fleet at ten times its capacity, for as long as you like.

The engine has a fixed speed. Clients send documents over HTTP ten times as fast as it embeds, while
others ask for the vectors of single queries. What must hold: memory is flat, refusals come at once,
and queries are answered about as fast as without the flood. Then one tenant asks queries ten times
as fast as they can be answered, while another asks one at a time. Prints one line of JSON; the exit
code is 1 when a target is missed.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import click

from vecfleet.bench import http_client, processes
from vecfleet.bench.http_client import Connection
from vecfleet.bench.query_flood import QueryFlood, flood_queries
from vecfleet.bench.soak_worker import STEP_TOKENS
from vecfleet.common import keys
from vecfleet.common.api_keys import add_key, new_key
from vecfleet.common.collection import Collection
from vecfleet.common.errors import VecfleetError
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.redis_client import connect_async
from vecfleet.common.settings import Settings
from vecfleet.fleet.machine import answers
from vecfleet.fleet.process import dies_with_parent, role_command
from vecfleet.fleet.redis_server import RedisServer, free_port

STEP_S = 0.05
TIMES_CAPACITY = 10
DOCUMENTS = 64  # of a request
IDS = 5000  # documents are replaced over and over: the index stays as large as it is
TEXT = " ".join(f"word{n}" for n in range(90))  # longer than the engine reads
TOKENS_READ = 64
QUEUE_TOKENS = 400_000
FLOODERS = 16
WARM_UP = 0.4  # of the time, before memory must be flat
TARGETS = {
    "refused_p99_ms": 50.0,
    "query_p99_ratio": 2.0,
    "rss_growth": 0.05,
    "redis_growth": 0.05,
    "queries_failed": 0,
    "unexpected": 0,  # answers to the flood that are neither 202 nor 429
    # A query while another tenant asks ten times what can be answered, in calls of two steps: it
    # waits for one such call until it is claimed, and for two in the engine, however many wait.
    "guest_p99_ratio": 10.0,
    "crowd_refused_p99_ms": 50.0,
    "guest_failed": 0,
}
_SAMPLE_S = 1.0
_START_S = 60.0
_MOST_SUBMISSIONS = 200
_EXPIRY_BYTES = 48  # of a key, in Redis's table of those that end


@dataclass(slots=True)
class Soak:
    """What one run has seen."""

    statuses: Counter[str] = field(default_factory=Counter)  # of the flood
    queries_failed: int = 0
    refused_s: list[float] = field(default_factory=list)
    queries_s: list[float] = field(default_factory=list)
    memory: list[dict[str, int]] = field(default_factory=list)  # bytes, by process
    submission_bytes: float = 0.0  # that Redis keeps of each accepted request, for a week


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--duration", type=click.FloatRange(10), default=1800.0, show_default=True)
@click.option("--keep", is_flag=True, help="Keep the fleet's data and logs.")
def main(duration: float, keep: bool) -> None:
    """Run a fleet at ten times its capacity for DURATION seconds."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        result = asyncio.run(_run(folder, duration))
    except VecfleetError as error:
        raise click.ClickException(error.message) from error
    finally:
        if keep:
            print(f"data and logs are in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result))
    sys.exit(not result["ok"])


async def _run(folder: Path, duration_s: float) -> dict[str, Any]:
    with ExitStack() as stack:
        (folder / "redis").mkdir()
        redis = stack.enter_context(RedisServer(folder / "redis", append_only=False))
        port, keyed_port = free_port(), free_port()
        crowd, guest = (_key(folder / "keys.json", tenant) for tenant in ("crowd", "guest"))
        pids = stack.enter_context(_roles(folder, redis.url, port, keyed_port))
        async with FleetClient(connect_async(redis.url)) as client:
            address = ("127.0.0.1", port)
            collection = await _ready(client, address)
            calm = Soak()
            await _query_for(address, calm, min(30.0, duration_s / 6))
            flood = await flood_queries(
                ("127.0.0.1", keyed_port),
                crowd,
                guest,
                text=TEXT,
                texts_per_s=STEP_TOKENS / TOKENS_READ / STEP_S,
                duration_s=min(60.0, duration_s / 6),
            )
            busy = Soak()
            await asyncio.gather(
                _flood_for(address, busy, collection.name, duration_s),
                _query_for(address, busy, duration_s),
                _watch_for(client, pids, busy, duration_s),
            )
    return _result(calm, busy, flood, duration_s)


def _key(file: Path, tenant: str) -> str:
    shown, entry = new_key(tenant)
    add_key(file, entry)
    return shown


@contextmanager
def _roles(folder: Path, redis_url: str, port: int, keyed_port: int) -> Iterator[dict[str, int]]:
    """The fleet's processes; their ids by name."""
    settings = Settings.checked({"max_queue_tokens": QUEUE_TOKENS})
    environment = settings.environment(
        redis_url=redis_url, data=str(folder / "data"), max_queue_tokens=str(QUEUE_TOKENS)
    )
    worker = [sys.executable, "-m", "vecfleet.bench.soak_worker", redis_url, str(STEP_S)]
    commands = {
        "search": role_command("aggregator", "--only", "search"),
        "writer": role_command("aggregator", "--only", "writer"),
        "worker": worker,
        "gateway": role_command("gateway", "--port", str(port), "--no-keys"),
        "keyed gateway": role_command(
            "gateway", "--port", str(keyed_port), "--keys-file", str(folder / "keys.json")
        ),
    }
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                running[name] = subprocess.Popen(
                    command,
                    env=environment,
                    stdout=log,
                    stderr=log,
                    preexec_fn=dies_with_parent(),
                )
        yield {name: process.pid for name, process in running.items()}
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _ready(client: FleetClient, address: tuple[str, int]) -> Collection:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            collection = await client.create_collection("soak", model="fake")
            await client.collection_stats(collection)
            if answers(f"http://{address[0]}:{address[1]}/live"):
                return collection
        except VecfleetError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.2)


async def _flood_for(
    address: tuple[str, int], soak: Soak, collection: str, duration_s: float
) -> None:
    """Send documents ten times as fast as the engine embeds them, whatever the answers are."""
    capacity = STEP_TOKENS / TOKENS_READ / STEP_S  # documents a second
    pause_s = FLOODERS * DOCUMENTS / (TIMES_CAPACITY * capacity)
    ends = time.monotonic() + duration_s
    next_id = 0

    async def drive(connection: Connection, due: float) -> None:
        nonlocal next_id
        while due < ends:
            await asyncio.sleep(due - time.monotonic())
            due += pause_s
            documents = [
                {"id": str((next_id + n) % IDS), "text": f"{next_id + n} {TEXT}"}
                for n in range(DOCUMENTS)
            ]
            next_id += DOCUMENTS
            path = f"/collections/{collection}/documents"
            keyed = {"idempotency-key": f"call {next_id}"} if next_id // DOCUMENTS % 2 else None
            answer = await connection.ask(http_client.post(path, {"documents": documents}, keyed))
            soak.statuses[str(answer.status)] += 1
            if answer.status == 429:
                soak.refused_s.append(answer.seconds)

    connections = [await Connection.open(address) for _ in range(FLOODERS)]
    now = time.monotonic()
    try:
        await asyncio.gather(
            *(drive(c, now + n * pause_s / FLOODERS) for n, c in enumerate(connections))
        )
    finally:
        for connection in connections:
            connection.close()


async def _query_for(address: tuple[str, int], soak: Soak, duration_s: float) -> None:
    """Ask for the vectors of single queries, one after the other."""
    connection = await Connection.open(address)
    ends = time.monotonic() + duration_s
    try:
        while time.monotonic() < ends:
            request = http_client.embeddings_request([f"a question {len(soak.queries_s)}"])
            answer = await connection.ask(request)
            if answer.status == 200:
                soak.queries_s.append(answer.seconds)
            else:
                soak.queries_failed += 1
            await asyncio.sleep(0.02)
    finally:
        connection.close()


async def _watch_for(
    client: FleetClient, pids: dict[str, int], soak: Soak, duration_s: float
) -> None:
    ends = time.monotonic() + duration_s
    while time.monotonic() < ends:
        used = {name: processes.usage(pid) for name, pid in pids.items()}
        seen = {name: usage.anon_bytes for name, usage in used.items()}
        seen["merging"] = used["writer"].children_anon_bytes  # children that come and go
        about: dict[str, Any] = cast(Any, await client.redis.info("memory"))
        accepted = soak.statuses["202"]
        soak.memory.append({**seen, "redis": int(about["used_memory"]), "accepted": accepted})
        await asyncio.sleep(_SAMPLE_S)
    soak.submission_bytes = await _submission_bytes(client)


async def _submission_bytes(client: FleetClient) -> float:
    """What Redis keeps of one submission whose documents are in; not of one that was refused."""
    sizes = []
    async for key in client.redis.scan_iter("vf:sub:*:ok", count=1000):
        of_it = (key.removesuffix(b":ok"), key, key.removesuffix(b"ok") + b"bad")
        sizes.append(sum([await _size(client, one) for one in of_it]))
        if len(sizes) > _MOST_SUBMISSIONS:
            break
    # Its line in the tenant's list, and that each key has a time to live.
    all_of_tenant = f"vf:subs:{keys.DEFAULT_TENANT}"
    count: int = cast(Any, await client.redis.zcard(all_of_tenant))
    line = await _size(client, all_of_tenant) / max(1, count)
    return statistics.mean(sizes) + line + 3 * _EXPIRY_BYTES


async def _size(client: FleetClient, key: str | bytes) -> int:
    return int(cast(Any, await client.redis.memory_usage(key, samples=0)) or 0)


def _p(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def _growth(samples: list[int]) -> float:
    """How much the last fifth is above what it was after the warm-up, as a share."""
    settled = samples[int(WARM_UP * len(samples)) :]
    part = max(1, len(settled) // 3)
    before = statistics.median(settled[:part])
    return statistics.median(settled[-part:]) / before - 1 if before else 0.0


def _result(calm: Soak, busy: Soak, flood: QueryFlood, duration_s: float) -> dict[str, Any]:
    for sample in busy.memory:  # what is kept on purpose is told apart
        sample["redis"] -= int(sample.pop("accepted") * busy.submission_bytes)
    names = busy.memory[0].keys()
    growth = {name: round(_growth([s[name] for s in busy.memory]), 4) for name in names}
    measured = {
        "refused_p99_ms": 1000 * _p(busy.refused_s, 0.99),
        "query_p99_ratio": _p(busy.queries_s, 0.99) / _p(calm.queries_s, 0.99),
        "rss_growth": max(growth[name] for name in names if name not in ("redis", "merging")),
        "redis_growth": growth["redis"],
        "queries_failed": busy.queries_failed,
        "unexpected": busy.statuses.total() - busy.statuses["202"] - busy.statuses["429"],
        "guest_p99_ratio": _p(flood.guest_s, 0.99) / _p(calm.queries_s, 0.99),
        "crowd_refused_p99_ms": 1000 * _p(flood.refused_s, 0.99),
        "guest_failed": flood.guest_failed,
    }
    kept = {name: measured[name] <= target for name, target in TARGETS.items()}
    return {
        "duration_s": duration_s,
        "cores": os.cpu_count(),
        **{name: round(value, 3) for name, value in measured.items()},
        "targets": TARGETS,
        "missed": [name for name, is_kept in kept.items() if not is_kept],
        "ok": all(kept.values()),
        "statuses": dict(busy.statuses),
        "refused_p50_ms": round(1000 * _p(busy.refused_s, 0.5), 1),
        "query_p50_ms": round(1000 * _p(busy.queries_s, 0.5), 1),
        "query_p99_ms": round(1000 * _p(busy.queries_s, 0.99), 1),
        "unloaded_p99_ms": round(1000 * _p(calm.queries_s, 0.99), 1),
        "guest_p50_ms": round(1000 * _p(flood.guest_s, 0.5), 1),
        "guest_p99_ms": round(1000 * _p(flood.guest_s, 0.99), 1),
        "crowd_p99_ms": round(1000 * _p(flood.accepted_s, 0.99), 1),
        "crowd_statuses": dict(flood.statuses),
        "growth": growth,
        "submission_bytes": round(busy.submission_bytes),
        "peak_mib": {name: max(s[name] for s in busy.memory) >> 20 for name in names},
    }


if __name__ == "__main__":
    main()
