"""A worker that is short of memory on a real Redis: it claims nothing, says so, and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable

import pytest
from servers import Process, eventually

from vecfleet.common import codec, keys
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.fleet_state import read_fleet_state
from vecfleet.common.queue_client import NewJob, QueueClient, Route
from vecfleet.common.redis_client import connect, connect_async
from vecfleet.common.reply_box import ReplyBox
from vecfleet.worker.batch_worker import BatchWorker
from vecfleet.worker.handlers import One
from vecfleet.worker.heartbeat import Timing
from vecfleet.worker.job import Answer
from vecfleet.worker.ledger import Announcement, Ledger
from vecfleet.worker.resources import Memory, Reading, ResourceWatch
from vecfleet.worker.window import ResourceLimits, Window

BULK = keys.embed_queue("5pace", "bulk")
FAST = keys.embed_queue("5pace", "interactive")
READY_S = 90.0


class Scale:
    """A host whose memory is used as the test says."""

    used_percent = 10.0

    def read(self) -> Reading:
        return Reading(Memory(1 << 40, int((1 << 40) * (1 - self.used_percent / 100))), 0.0)

    def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def running(redis_url: str, watch: ResourceWatch, windows: dict):
    async def echo(job):
        return Answer({"got": job.payload})

    worker = BatchWorker(
        Ledger(connect(redis_url), "w1"),
        queues=lambda: [FAST, BULK],
        handlers={"echo": One(echo)},
        windows=windows,
        announce=lambda: Announcement(pools=("embed.5pace",), status=watch.fields()),
        timing=Timing(heartbeat_s=0.05, rescue_s=0.05, drain_s=20),
    )
    stop = asyncio.Event()
    task = asyncio.create_task(worker.run(stop))
    try:
        yield
    finally:
        stop.set()
        await task


@pytest.mark.parametrize("queue", [FAST, BULK], ids=["interactive", "bulk"])
async def test_it_claims_nothing_says_so_and_comes_back(redis_url: str, queue) -> None:
    windows = {lane: Window(max_tokens=1000, max_jobs=10) for lane in keys.LANES}
    scale = Scale()
    watch = ResourceWatch(windows, ResourceLimits(), scale)
    queues, box = QueueClient(connect_async(redis_url)), ReplyBox(connect_async(redis_url))
    state = connect_async(redis_url)

    async def ask(number: int) -> asyncio.Future:
        job = NewJob(f"j-{number}", codec.pack_call("echo", number), 10)
        future = box.expect(job.id)
        await queues.enqueue(queue, [job], Route(box=box.name))
        return future

    async def shows(name: str, value: str) -> bool:
        workers = (await read_fleet_state(state)).workers
        return bool(workers) and workers[0].fields.get(name) == value

    await box.open()
    async with running(redis_url, watch, windows):
        assert (await box.wait("j-1", await ask(1), 20))["got"] == 1

        scale.used_percent = 95.0
        watch.check()
        await eventually(lambda: shows("state", "paused"), what="the state")
        assert await shows("paused", "95 % of the host's memory is used")
        answer = await ask(2)
        done, _ = await asyncio.wait([answer], timeout=2)  # nothing can be seen but that it waits
        assert not done
        loads = {load.queue: load.jobs for load in (await read_fleet_state(state)).queues}
        assert loads[str(queue)] == 1

        scale.used_percent = 50.0
        watch.check()
        assert (await box.wait("j-2", answer, 20))["got"] == 2
        # A heartbeat may have come while the job was still in hand.
        await eventually(lambda: shows("state", "idle"), what="the state")
        assert await shows("paused", "")
    await box.close()


async def test_a_process_at_its_limit_says_so_and_leaves_the_work_to_others(
    run_role: Callable[..., Process], redis_url: str
) -> None:
    def start(*, limit: str) -> Process:
        return run_role(
            "--log-format", "json", "worker", "--engine", "fake", "--model", "M",
            "--redis", redis_url,
            env={"VECFLEET_MAX_MEMORY_PERCENT": limit, "VECFLEET_RESOURCE_CHECK_S": "0.1"},
        )  # fmt: skip

    def status() -> list[dict[str, str]]:
        process = run_role("status", "--redis", redis_url, "--json")
        assert process.wait() == 0
        return json.loads(process.output)["workers"]

    paused = start(limit="0.01")
    await asyncio.to_thread(paused.wait_for_line, "claims nothing: .* memory is used", READY_S)
    await asyncio.to_thread(paused.wait_for_line, "worker ready", READY_S)
    (shown,) = await asyncio.to_thread(status)
    assert shown["state"] == "paused"
    assert shown["paused"].endswith("of the host's memory is used")

    async with FleetClient(connect_async(redis_url)) as client:
        asked = asyncio.create_task(client.embed(["a text"], model="M", timeout_s=READY_S))
        await eventually(
            lambda: connect(redis_url).zcard(keys.MODELS) and not asked.done(), what="a model"
        )
        done, _ = await asyncio.wait([asked], timeout=2)
        assert not done  # nobody claims it
        free = await asyncio.to_thread(start, limit="100")
        reply = await asked
        assert len(reply.tokens) == 1

    async def one_works() -> bool:  # a heartbeat may have come while the job was still in hand
        return {w["state"] for w in await asyncio.to_thread(status)} == {"paused", "idle"}

    await eventually(one_works, what="the states")
    assert await asyncio.to_thread(free.stop, 60) == 0
    assert await asyncio.to_thread(paused.stop, 60) == 0
