"""Hand-written ways of a client through the gateway; each answer is checked and must be right."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import orjson
from fuzz.contract import Contract
from fuzz.corpus import Request
from fuzz.fleet import MODEL
from fuzz.keys import CANARY, RIVALS_COLLECTION, Key, Keyring
from fuzz.requests_run import JSON, Tally, check_one
from fuzz.wire import Answer, Connection, request_bytes

from vecfleet.worker.fake_engine import NAN

DOCUMENTS = 20
_PAUSE_S = 0.02


class Client:
    """One connection; every answer is held against the contract."""

    def __init__(
        self,
        port: int,
        contract: Contract,
        tally: Tally,
        key: Key | None = None,
        keyring: Keyring | None = None,
    ) -> None:
        self._connection = Connection(port)
        self._contract = contract
        self._tally = tally
        self._key = key
        self._keyring = keyring

    async def send(self, method: str, target: str, body: Any = None) -> Answer:
        """The answer, whatever its status is."""
        raw = None if body is None else json.dumps(body).encode()
        headers = {**JSON, **(self._key.headers() if self._key else {})}
        request = Request(method, target, headers, raw, "a story", self._key)
        return await check_one(
            self._connection, self._contract, request, self._tally, keyring=self._keyring
        )

    async def ask(self, method: str, target: str, body: Any = None, status: int = 200) -> Any:
        """The answer's JSON; raises ``AssertionError`` for another status."""
        answer = await self.send(method, target, body)
        assert answer.status == status, f"{method} {target}: {answer.status} {answer.body[:300]!r}"
        return orjson.loads(answer.body) if "json" in answer.headers["content-type"] else None

    async def follow(self, submission: str, deadline_s: float = 60.0) -> Any:
        """The submission once it is done."""

        def is_done(found: Any) -> bool:
            return bool(found["state"] == "done")

        return await self.until(f"/submissions/{submission}", is_done, deadline_s)

    async def until(
        self, target: str, is_good: Callable[[Any], bool], deadline_s: float = 60.0
    ) -> Any:
        """What ``target`` answers once it is good."""
        async with asyncio.timeout(deadline_s):
            while not is_good(found := await self.ask("GET", target)):
                await asyncio.sleep(_PAUSE_S)
        return found

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


async def get_document(port: int, key: Key | None = None) -> dict[str, Any]:
    """The gateway's OpenAPI document, as a client gets it; waits until it listens."""
    connection = Connection(port)
    headers = key.headers() if key else {}
    async with asyncio.timeout(30):  # it says where it listens a moment before it does
        while True:
            answer = await connection.exchange(request_bytes("GET", "/openapi.json", headers, None))
            if answer.status == 200:
                break
            await asyncio.sleep(_PAUSE_S)
    connection.close()
    document: dict[str, Any] = orjson.loads(answer.body)
    return document


async def prepare(client: Client) -> None:
    """Two collections with a few documents in them."""
    await client.until("/health", lambda found: found["status"] == "healthy", 30)
    for name, versions in (("books", "assigned"), ("given", "given")):
        await client.ask("PUT", f"/collections/{name}", {"versions": versions}, 201)
        documents: list[dict[str, Any]] = [
            {"id": f"d{i}", "text": f"the text of number {i}", "metadata": {"n": i}}
            for i in range(DOCUMENTS)
        ]
        if versions == "given":
            documents = [{**document, "version": 1} for document in documents]
        target = f"/collections/{name}/documents"
        taken = await client.ask("POST", target, {"documents": documents}, 202)
        await client.follow(taken["submission_id"])


async def settle_rival(client: Client, keyring: Keyring) -> None:
    """Give the rival documents, a submission and a dead entry, and note what must stay secret."""
    for name in ("books", RIVALS_COLLECTION):
        made = await client.ask("PUT", f"/collections/{name}", {}, 201)
        keyring.secrets.add(made["uid"])
        documents = [_canary(i) for i in range(5)] + [
            {"id": f"{CANARY}-bad", "text": f"{CANARY} {NAN}"}
        ]
        target = f"/collections/{name}/documents"
        taken = await client.ask("POST", target, {"documents": documents}, 202)
        keyring.secrets.add(taken["submission_id"])
        assert (await client.follow(taken["submission_id"]))["failed"] == 1
    page = await client.ask("GET", "/dead")
    keyring.secrets |= {entry["id"] for entry in page["entries"]}
    assert len(page["entries"]) == 2, page


async def check_rival(client: Client, keyring: Keyring) -> None:
    """Nothing of the rival's has gone or changed."""
    for name in ("books", RIVALS_COLLECTION):
        assert (await client.ask("GET", f"/collections/{name}"))["stats"]["documents"] == 5
        for want in (_canary(i) for i in range(5)):
            target = f"/collections/{name}/documents/{want['id']}"
            found = await client.ask("GET", target)
            assert {**want, "version": found["version"]} == found, found
    page = await client.ask("GET", "/dead")
    assert {entry["id"] for entry in page["entries"]} <= keyring.secrets
    assert len(page["entries"]) == 2, page


def _canary(number: int) -> dict[str, Any]:
    return {
        "id": f"{CANARY}-{number}",
        "text": f"{CANARY} tells of {number}",
        "metadata": {CANARY: number},
    }


async def story(client: Client, name: str, tally: Tally) -> None:
    """One client's whole way: create, ingest, follow, search, read, delete; all must be right."""
    try:
        await _collection_story(client, name)
        await _dead_story(client, name)
    except (AssertionError, TimeoutError, KeyError) as fault:
        tally.failures.append(f"story {name}: {fault!r}")
    finally:
        client.close()


async def _collection_story(client: Client, name: str) -> None:
    ask = client.ask
    base = f"/collections/{name}"
    made = await ask("PUT", base, {}, 201)
    assert (await ask("PUT", base, {}, 201))["uid"] == made["uid"]
    assert name in [found["name"] for found in (await ask("GET", "/collections"))["collections"]]
    documents = [{"id": f"{name}/{i}", "text": f"{name} tells of {i}"} for i in range(5)]
    taken = await ask("POST", f"{base}/documents", {"documents": documents}, 202)
    done = await client.follow(taken["submission_id"])
    assert (done["committed"], done["failed"]) == (5, 0), done
    for method, end in (("DELETE", ""), ("POST", "/cancel")):  # what is done stays done
        target = f"/submissions/{taken['submission_id']}{end}"
        assert (await ask(method, target))["committed"] == 5
    wanted = documents[2]
    found = await ask("POST", f"{base}/search", {"query": wanted["text"]})
    assert found["results"][0]["id"] == wanted["id"], found
    assert (await ask("GET", f"{base}/documents/{wanted['id']}"))["text"] == wanted["text"]
    assert (await ask("GET", base))["stats"]["documents"] == 5
    gone = await ask("DELETE", f"{base}/documents/{wanted['id']}", None, 202)
    await client.follow(gone["submission_id"])
    await ask("GET", f"{base}/documents/{wanted['id']}", None, 404)
    rest = await ask("POST", f"{base}/search", {"query": wanted["text"]})
    assert wanted["id"] not in [row["id"] for row in rest["results"]]
    assert (await ask("DELETE", base))["uid"] == made["uid"]
    await ask("POST", f"{base}/search", {"query": "nothing"}, 404)


async def _dead_story(client: Client, name: str) -> None:
    """A text that no engine can do: found, tried again with a better one, another dropped."""
    base = f"/collections/{name}-dead"
    await client.ask("PUT", base, {}, 201)
    documents = [{"id": f"{name}-{i}", "text": f"{NAN} {name} {i}"} for i in range(2)]
    taken = await client.ask("POST", f"{base}/documents", {"documents": documents}, 202)
    assert (await client.follow(taken["submission_id"]))["failed"] == 2
    page = await client.ask("GET", f"/dead?collection={name}-dead")
    first, second = page["entries"]
    entry = await client.ask("GET", f"/dead/{quote(first['id'], safe='')}")
    assert entry["documents"][0]["text"].startswith(f"{NAN} {name}"), entry
    target = f"/dead/{quote(first['id'], safe='')}/retry"
    await client.ask("POST", target, {"text": "a better text"}, 202)
    one = f"{base}/documents/{first['documents'][0]['id']}"
    async with asyncio.timeout(60):
        while not (await client.ask("GET", base))["stats"]["documents"]:
            await asyncio.sleep(_PAUSE_S)
    assert (await client.ask("GET", one))["text"] == "a better text"
    assert (await client.ask("DELETE", f"/dead/{quote(second['id'], safe='')}"))["dropped"]
    await client.ask("GET", f"/dead/{quote(second['id'], safe='')}", None, 404)
    for method, path in (("POST", "/dead/retries"), ("DELETE", "/dead")):  # of what is left
        swept = await client.ask(method, f"{path}?collection={name}-dead")
        assert swept["done"] == 0 and not swept["failed"], swept
    await client.ask("DELETE", base)


async def queries(client: Client) -> None:
    """Every route that only asks, once."""
    model = (await client.ask("GET", "/v1/models"))["data"][0]["id"]
    assert (await client.ask("GET", f"/v1/models/{quote(model, safe='')}"))["id"] == model
    await client.ask("GET", "/live")
    await client.ask("GET", "/health")
    await client.ask("POST", "/embed", {"inputs": ["one", "two"]})
    await client.ask("POST", "/v1/embeddings", {"input": "one", "model": model})
    rerank = {"query": "a b", "documents": ["a", "b c"]}
    for path in ("/v1/rerank", "/v2/rerank"):
        assert len((await client.ask("POST", path, {"model": model, **rerank}))["results"]) == 2
    await client.ask("POST", "/rerank", {"query": "a", "texts": ["a", "b"]})
    await client.ask("POST", "/search", {"query": "the text of number 3"})


async def still_serves(client: Client) -> None:
    """Embed one text, so that a fleet that answers nothing but errors is noticed."""
    found = await client.ask("POST", "/v1/embeddings", {"input": "still here", "model": MODEL})
    assert len(found["data"][0]["embedding"]) > 1
