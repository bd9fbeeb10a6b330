"""Shorter vectors from a real model through real processes, at every door, into a collection."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from servers import Process, eventually, module_or_skip

from vecfleet.common.errors import InvalidInput, InvalidVector
from vecfleet.fleet.process import role_command
from vecfleet.producer import AsyncProducer

MODEL = "tiny/qwen3"
FULL, CUT = 128, 33
READY_S = 90.0
TEXTS = [
    "the capital of China is Beijing",
    "gravity is a force that attracts two bodies",
    "retrieve relevant passages",
    "the requirements of the document",
]
TASK = "Given a question, retrieve what the document says"


@dataclass
class Doors:
    """A fleet with one small model, and how it is reached."""

    url: str
    http: httpx.AsyncClient
    producer: AsyncProducer
    folder: Path

    async def command(self, *arguments: str, ends: int = 0) -> str:
        """What ``vecfleet ARGUMENTS...`` prints; it exits with ``ends``."""
        environment = {"VECFLEET_REDIS_URL": self.url, "VECFLEET_DATA": str(self.folder)}
        process = Process(role_command(*arguments), env=environment, cwd=self.folder)
        try:
            code = await asyncio.to_thread(process.wait, 60)
        finally:
            process.close()
        assert code == ends, process.output
        return process.output

    async def vectors(self, texts: list[str], **asked: Any) -> Any:
        """Over HTTP; all other doors are compared with this one."""
        answer = await self.http.post("/v1/embeddings", json={"input": texts, **asked})
        assert answer.status_code == 200, answer.text
        return np.array([row["embedding"] for row in answer.json()["data"]], np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module_or_skip("torch")
    from engines import checkpoints

    folder = checkpoints.qwen3_embedding(tmp_path_factory.mktemp("tiny-qwen3"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_matryoshka": True}))
    return folder


@pytest.fixture
async def doors(redis_url, run_role, tmp_path, checkpoint) -> AsyncIterator[Doors]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_role("aggregator", "--redis", redis_url, "--data", str(tmp_path / "index"))
    worker = ["--model", str(checkpoint), "--served-name", MODEL, "--engine", "torch"]
    run_role("worker", "--redis", redis_url, "--device", "cpu", "--dtype", "float32", *worker)
    run_role("gateway", "--redis", redis_url, "--port", str(port), "--no-keys")
    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http,
        AsyncProducer(redis_url) as producer,
    ):

        async def healthy() -> bool:
            try:
                return (await http.get("/health")).json()["status"] == "healthy"
            except httpx.TransportError:
                return False

        await eventually(healthy, READY_S, "the fleet")
        yield Doors(redis_url, http, producer, tmp_path)


def cut(vectors: Any, dimensions: int) -> Any:
    """What numpy says the cut is."""
    first = np.asarray(vectors, np.float64)[:, :dimensions]
    return first / np.linalg.norm(first, axis=1, keepdims=True)


async def test_every_door_gives_the_same_short_vectors(doors: Doors) -> None:
    (model,) = (await doors.http.get("/v1/models")).json()["data"]
    assert (model["dimension"], model["matryoshka"]) == (FULL, True)
    assert model["prompts"] == ["document", "query"]
    full = await doors.vectors(TEXTS)
    assert full.shape == (len(TEXTS), FULL)
    expected = cut(full, CUT)
    short = await doors.vectors(TEXTS, dimensions=CUT)
    np.testing.assert_allclose(short, expected, atol=1e-5)

    tei = await doors.http.post("/embed", json={"inputs": TEXTS, "dimensions": CUT})
    np.testing.assert_allclose(tei.json(), expected, atol=1e-5)

    reply = await doors.producer.embed(TEXTS, dimensions=CUT)
    assert reply.dimension == CUT
    rows = np.frombuffer(reply.vectors, "<f4").reshape(-1, CUT)
    np.testing.assert_allclose(rows, expected, atol=1e-5)

    said = await doors.command("embed", TEXTS[0], "--dimensions", str(CUT))
    np.testing.assert_allclose(json.loads(said)["vector"], expected[0], atol=1e-5)

    too_long = {"input": TEXTS, "dimensions": FULL + 1}
    refused = await doors.http.post("/v1/embeddings", json=too_long)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")
    with pytest.raises(InvalidInput, match=f"from 1 to {FULL}"):
        await doors.producer.embed(TEXTS, dimensions=FULL + 1)


async def test_prompts_and_instructions_stand_before_the_text(doors: Doors) -> None:
    prompt = "Instruct: Given a web search query, retrieve relevant passages\nQuery:"
    by_hand = await doors.vectors([prompt + text for text in TEXTS])
    named = await doors.vectors(TEXTS, prompt_name="query")
    np.testing.assert_allclose(named, by_hand, atol=1e-5)

    by_hand = await doors.vectors([f"Instruct: {TASK}\nQuery:{text}" for text in TEXTS])
    told = await doors.vectors(TEXTS, instruction=TASK)
    np.testing.assert_allclose(told, by_hand, atol=1e-5)
    reply = await doors.producer.embed(TEXTS, instruction=TASK)
    np.testing.assert_allclose(np.frombuffer(reply.vectors, "<f4"), by_hand.ravel(), atol=1e-5)
    said = await doors.command("embed", TEXTS[1], "--instruction", TASK)
    np.testing.assert_allclose(json.loads(said)["vector"], by_hand[1], atol=1e-5)
    assert not np.allclose(told, named, atol=1e-3)


async def test_a_collection_of_short_vectors_is_filled_and_searched(doors: Doors) -> None:
    documents = doors.folder / "documents.jsonl"
    lines = [json.dumps({"id": f"d{i}", "text": text}) for i, text in enumerate(TEXTS)]
    documents.write_text("\n".join(lines))
    into = ["ingest", str(documents), "--collection", "short", "--dimensions", str(CUT), "--json"]
    assert json.loads((await doors.command(*into)).splitlines()[-1])["committed"] == len(TEXTS)
    into[-2] = str(CUT + 1)
    assert f"{CUT} dimensions" in await doors.command(*into, ends=2)
    described = (await doors.http.get("/collections/short")).json()
    assert (described["dimension"], described["stats"]["documents"]) == (CUT, len(TEXTS))

    stored = cut(await doors.vectors(TEXTS), CUT)
    for instruction in (None, TASK):
        asked = {"prompt_name": "query"} if instruction is None else {"instruction": instruction}
        query = cut(await doors.vectors(["a force"], **asked), CUT)[0]
        expected = dict(zip((f"d{i}" for i in range(len(TEXTS))), stored @ query, strict=True))
        body = {"query": "a force"} if instruction is None else {"query": "a force", **asked}
        answer = await doors.http.post("/collections/short/search", json=body)
        found = {hit["id"]: hit["score"] for hit in answer.json()["results"]}
        assert found == pytest.approx(expected, abs=2e-3)  # float16 in the index
        hits = await doors.producer.search("short", "a force", instruction=instruction)
        assert {hit.id: hit.score for hit in hits} == pytest.approx(expected, abs=2e-3)

    raw = await doors.http.post("/collections/short/search", json={"vector": stored[2].tolist()})
    assert raw.json()["results"][0]["id"] == "d2"
    long = await doors.http.post("/collections/short/search", json={"vector": [1.0] * FULL})
    assert (long.status_code, long.json()["error"]["code"]) == (400, "invalid_vector")
    with pytest.raises(InvalidVector):
        await doors.producer.search("short", vector=[1.0] * FULL)
