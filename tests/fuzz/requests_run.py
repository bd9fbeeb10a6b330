"""Many requests at once against a live fleet; every answer is held against the contract."""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from fuzz.contract import Broken, Contract
from fuzz.corpus import Request, generate, spread
from fuzz.fleet import MODEL
from fuzz.mutations import mutated
from fuzz.wire import Answer, Connection, request_bytes

CLIENTS = 24
JSON = {"content-type": "application/json"}


@dataclass
class Tally:
    """What was sent and what came back."""

    cases: int = 0
    closed: int = 0  # connections that ended without an answer
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seen_5xx: int = 0

    def count(self, answer: Answer, *, away: bool = False) -> None:
        """One more answer."""
        self.cases += 1
        self.statuses[answer.status] += 1
        self.closed += answer.status == 0
        self.seen_5xx += answer.status >= 500 and not (away and answer.status in (503, 504))


def build_corpus(document: dict[str, Any], total: int, seed: int, workers: int) -> list[Request]:
    """About ``total`` requests by schemathesis, made by several processes."""
    plan = list(spread(total, document))
    if workers < 2:
        made = [generate(document, label, count, seed) for label, count in plan]
        return [request for some in made for request in some]
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(generate, document, label, count, seed) for label, count in plan]
        return [request for job in jobs for request in job.result()]


def stream(corpus: Sequence[Request], total: int, seed: int) -> Iterator[Request]:
    """The corpus in a shuffled order, then mutations of it, ``total`` requests in all."""
    generator = random.Random(seed)
    order = list(corpus)
    generator.shuffle(order)
    yield from order[:total]
    for _ in range(total - len(order)):
        yield mutated(generator.choice(corpus), generator, corpus)


async def send_all(
    port: int, contract: Contract, requests: Iterable[Request], tally: Tally, *, away: bool = False
) -> None:
    """Send all of ``requests`` over ``CLIENTS`` connections and check the answers."""
    source = iter(requests)

    async def client() -> None:
        connection = Connection(port)
        for request in source:
            await check_one(connection, contract, request, tally, away=away)
        connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(client())


async def check_one(
    connection: Connection,
    contract: Contract,
    request: Request,
    tally: Tally,
    *,
    away: bool = False,
) -> Answer:
    """Send one request; what breaks the contract is kept in the tally with what replays it."""
    raw = request_bytes(request.method, request.target, request.headers, request.body)
    try:
        answer = await connection.exchange(raw)
    except TimeoutError:
        tally.failures.append(told(request, raw, "no answer within 60 s"))
        return Answer()
    tally.count(answer, away=away)
    try:
        contract.check(request.method, request.target, answer, away=away)
    except Broken as fault:
        tally.failures.append(told(request, raw, str(fault)))
    return answer


def told(request: Request, raw: bytes, fault: str) -> str:
    """A failure with the bytes that replay it."""
    shown = base64.b64encode(raw).decode() if len(raw) < 20_000 else f"({len(raw)} bytes)"
    return f"{request.method} {request.target[:120]} ({request.origin}): {fault}\n  replay: {shown}"


async def get_document(port: int) -> dict[str, Any]:
    """The gateway's OpenAPI document, as a client gets it."""
    connection = Connection(port)
    answer = await connection.exchange(request_bytes("GET", "/openapi.json", {}, None))
    connection.close()
    assert answer.status == 200, answer
    document: dict[str, Any] = orjson.loads(answer.body)
    return document


async def prepare(port: int) -> None:
    """Two collections with a few documents in them."""
    connection = Connection(port)
    async with asyncio.timeout(30):  # it says where it listens a moment before it does
        while (await connection.exchange(request_bytes("GET", "/health", {}, None))).status != 200:
            await asyncio.sleep(0.02)
    for name, versions in (("books", "assigned"), ("given", "given")):
        body = json.dumps({"versions": versions}).encode()
        await _expect(connection, "PUT", f"/collections/{name}", body, 201)
        documents: list[dict[str, Any]] = [
            {"id": f"d{i}", "text": f"the text of number {i}", "metadata": {"n": i}}
            for i in range(20)
        ]
        if versions == "given":
            documents = [{**document, "version": 1} for document in documents]
        body = json.dumps({"documents": documents}).encode()
        taken = await _expect(connection, "POST", f"/collections/{name}/documents", body, 202)
        await follow(connection, taken["submission_id"])
    connection.close()


async def story(port: int, name: str, tally: Tally) -> None:
    """One client's whole way: create, ingest, follow, search, read, delete; all must be right."""
    connection = Connection(port)

    async def ask(method: str, target: str, body: Any, status: int) -> Any:
        raw = None if body is None else json.dumps(body).encode()
        tally.cases += 1
        return await _expect(connection, method, target, raw, status)

    try:
        base = f"/collections/{name}"
        made = await ask("PUT", base, {}, 201)
        assert (await ask("PUT", base, {}, 201))["uid"] == made["uid"]
        documents = [{"id": f"{name}/{i}", "text": f"{name} tells of {i}"} for i in range(5)]
        taken = await ask("POST", f"{base}/documents", {"documents": documents}, 202)
        done = await follow(connection, taken["submission_id"])
        assert (done["committed"], done["failed"]) == (5, 0), done
        found = await ask("POST", f"{base}/search", {"query": documents[2]["text"]}, 200)
        assert found["results"][0]["id"] == documents[2]["id"], found
        assert (await ask("GET", base, None, 200))["stats"]["documents"] == 5
        gone = await ask("DELETE", f"{base}/documents/{documents[2]['id']}", None, 202)
        await follow(connection, gone["submission_id"])
        await ask("GET", f"{base}/documents/{documents[2]['id']}", None, 404)
        rest = await ask("POST", f"{base}/search", {"query": documents[2]["text"]}, 200)
        assert documents[2]["id"] not in [row["id"] for row in rest["results"]]
        assert (await ask("DELETE", base, None, 200))["uid"] == made["uid"]
        await ask("POST", f"{base}/search", {"query": "nothing"}, 404)
    except (AssertionError, TimeoutError) as fault:
        tally.failures.append(f"story {name}: {fault!r}")
    finally:
        connection.close()


async def follow(connection: Connection, submission: str, deadline_s: float = 60.0) -> Any:
    """The submission once it is done."""
    async with asyncio.timeout(deadline_s):
        while True:
            found = await _expect(connection, "GET", f"/submissions/{submission}", None, 200)
            if found["state"] == "done":
                return found
            await asyncio.sleep(0.02)


async def _expect(
    connection: Connection, method: str, target: str, body: bytes | None, status: int
) -> Any:
    answer = await connection.exchange(request_bytes(method, target, JSON, body))
    assert answer.status == status, f"{method} {target}: {answer.status} {answer.body[:300]!r}"
    return orjson.loads(answer.body)


async def still_serves(port: int) -> None:
    """Embed one text, so that a fleet that answers nothing but errors is noticed."""
    connection = Connection(port)
    body = json.dumps({"input": "still here", "model": MODEL}).encode()
    found = await _expect(connection, "POST", "/v1/embeddings", body, 200)
    connection.close()
    assert len(found["data"][0]["embedding"]) > 1


def keep_failures(tally: Tally, folder: Path, most: int = 20) -> None:
    """Write the first failures down for a person to look at."""
    if tally.failures:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "failures.txt").write_text("\n\n".join(tally.failures[:most]) + "\n")
