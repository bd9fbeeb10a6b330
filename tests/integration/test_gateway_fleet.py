"""The gateway before a real worker, aggregator and search process, each a process of its own."""

import asyncio
import struct

import httpx
import pytest
from servers import address_of, eventually

from vecfleet.worker.fake_engine import fake_vector

DIMENSION = 32
MODEL = "fake"
NDJSON = {"content-type": "application/x-ndjson"}


@pytest.fixture
async def http(redis_url, run_role, tmp_path):
    run_role("aggregator", "--redis", redis_url, "--data", str(tmp_path))
    run_role("worker", "--redis", redis_url, "--engine", "fake", "--model", MODEL)
    process = run_role(
        "gateway", "--redis", redis_url, "--port", "0", "--collection", "books", "--no-keys"
    )
    url = await asyncio.to_thread(address_of, process)
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:

        async def healthy():
            return (await client.get("/health")).status_code == 200

        await eventually(healthy, what="a served model")
        yield client


async def done(http, submission):
    async def state():
        seen = (await http.get(f"/submissions/{submission}")).json()
        return seen if seen["state"] == "done" else None

    return await eventually(state, what="the submission")


async def test_from_documents_to_answers(http):
    made = await http.put("/collections/books", json={"model": MODEL, "policy": "exact"})
    assert made.status_code == 201, made.text
    texts = {f"shelf/{i}": f"book number {i}" for i in range(700)}
    stream = b"\n".join(
        b'{"id": "%b", "text": "%b", "metadata": {"n": 1}}' % (i.encode(), text.encode())
        for i, text in texts.items()
    )
    sent = await http.post("/collections/books/documents", content=stream, headers=NDJSON)
    assert (sent.status_code, sent.json()["accepted"]) == (202, 700)
    seen = await done(http, sent.json()["submission_id"])
    assert (seen["committed"], seen["failed"], seen["pending"]) == (700, 0, 0)

    hits = await http.post(
        "/collections/books/search", json={"query": "book number 7", "top_k": 3, "rerank": True}
    )
    assert hits.status_code == 200, hits.text
    best = hits.json()["results"][0]
    assert (best["id"], best["text"], best["metadata"]) == ("shelf/7", "book number 7", {"n": 1})
    assert best["relevance_score"] == pytest.approx(1.0)

    vector = fake_vector("book number 9", DIMENSION).tolist()
    near = await http.post("/collections/books/search", json={"vector": vector, "top_k": 1})
    assert near.json()["results"][0]["id"] == "shelf/9"
    assert near.json()["results"][0]["score"] == pytest.approx(1.0, abs=1e-3)

    plain = await http.post("/search", json={"query": "book number 8", "score_threshold": 0.99})
    assert [row["doc_id"] for row in plain.json()["results"]] == ["shelf/8"]

    read = await http.get("/collections/books/documents/shelf/5")
    assert (read.status_code, read.json()["text"]) == (200, "book number 5")
    deleted = await http.delete("/collections/books/documents/shelf/5")
    await done(http, deleted.json()["submission_id"])
    assert (await http.get("/collections/books/documents/shelf/5")).status_code == 404

    described = (await http.get("/collections/books")).json()
    assert described["stats"]["documents"] == 699

    async def is_counted():  # a look is kept for a second, and waits two for the search process
        health = (await http.get("/health")).json()
        return (health["status"], health["documents_indexed"]) == ("healthy", 699)

    await eventually(is_counted, what="a look at the whole index")
    assert (await http.delete("/collections/books")).status_code == 200
    assert (await http.get("/collections/books")).status_code == 404


async def test_vectors_and_scores_over_http(http):
    embedded = await http.post(
        "/v1/embeddings", json={"input": ["one", "two"], "encoding_format": "bytes"}
    )
    assert embedded.status_code == 200, embedded.text
    rows = struct.unpack(f"<{2 * DIMENSION}f", embedded.content)
    assert rows[:DIMENSION] == pytest.approx(fake_vector("one", DIMENSION).tolist())
    assert float(embedded.headers["x-inference-time"]) >= 0
    assert int(embedded.headers["x-compute-tokens"]) > 0
    ranked = await http.post("/rerank", json={"query": "a b", "texts": ["c", "b a"]})
    assert [row["index"] for row in ranked.json()] == [1, 0]
    bad = await http.post("/embed", json={"inputs": "word " * 500, "truncate": False})
    assert (bad.status_code, bad.json()["error_type"]) == (422, "Validation")
    cut = await http.post("/embed", json={"inputs": "word " * 500, "truncate": True})
    assert (cut.status_code, cut.headers["x-truncated"]) == (200, "1")
