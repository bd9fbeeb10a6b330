"""What tenants share: one may take much, and something is left for the next."""

import asyncio
from contextlib import asynccontextmanager

import httpx
import pytest
from gateway_fakes import FakeFleet

from vecfleet.common.api_keys import add_key, new_key
from vecfleet.common.errors import ConfigError
from vecfleet.gateway.app import create_app
from vecfleet.gateway.config import GatewayConfig, GatewayLimits
from vecfleet.gateway.shares import Shares

DOCUMENTS = "/collections/books/documents"
NDJSON = {"content-type": "application/x-ndjson"}


def taken(shares, tenant):
    count = 0
    while shares.take(tenant):
        count += 1
    return count


def test_one_alone_gets_half_and_every_further_one_something():
    shares = Shares(64)
    assert [taken(shares, name) for name in "abcdefg"] == [32, 16, 8, 4, 2, 1, 1]
    assert not shares.take("h")


def test_what_is_given_back_is_free_again():
    shares = Shares(64)
    assert taken(shares, "a") == 32
    shares.give("a", 31)
    assert taken(shares, "b") == 32
    assert taken(shares, "a") == 15
    shares.give("b", 32)
    shares.give("a", 16)
    assert shares.take("c", 64)
    assert not shares.take("d", 1)


def test_a_bound_of_one_takes_one():
    shares = Shares(1)
    assert (shares.take("a"), shares.take("b")) == (True, False)


@pytest.fixture
def keys(tmp_path):
    found = {"path": tmp_path / "keys.json"}
    for tenant in ("acme", "rival"):
        shown, entry = new_key(tenant)
        add_key(found["path"], entry)
        found[tenant] = {"x-api-key": shown}
    return found


@asynccontextmanager
async def gateway(keys, **limits):
    config = GatewayConfig("unused", keys_file=keys["path"], limits=GatewayLimits(**limits))
    app = create_app(FakeFleet(), config)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        yield app, http


class Unfinished:
    """A request of which a part has come, and the rest does not."""

    def __init__(self, app, path, headers, part):
        self.status = None
        self.settled = asyncio.Event()  # it was refused, or its part is read
        self.go_on = asyncio.Event()
        self._parts = [part]
        named = {**headers, "transfer-encoding": "chunked"}
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in named.items()],
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self):
        if self._parts:
            return {"type": "http.request", "body": self._parts.pop(), "more_body": True}
        self.settled.set()
        await self.go_on.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.settled.set()


@asynccontextmanager
async def unfinished(count, *about):
    """Start ``count`` such requests; gives the status of each, None for one that is being read."""
    requests = [Unfinished(*about) for _ in range(count)]
    for request in requests:
        await request.settled.wait()
    yield [request.status for request in requests]
    for request in requests:
        request.go_on.set()
    await asyncio.gather(*(request.task for request in requests))


async def test_one_tenants_unfinished_bodies_do_not_shut_out_another(keys):
    async with gateway(keys, max_buffered_bytes=1 << 20) as (app, http):
        part = b" " * 50_000
        async with unfinished(30, app, "/v1/embeddings", keys["acme"], part) as told:
            assert set(told) == {None, 503}
            assert told.count(None) == 10  # half of it
            body = {"input": "a" * 1000}
            answer = await http.post("/v1/embeddings", json=body, headers=keys["rival"])
            assert answer.status_code == 200, answer.text
        body = {"inputs": "a" * 500_000}
        answer = await http.post("/v1/rerank", json=body, headers=keys["acme"])
        assert answer.status_code == 400  # it was read


async def test_one_tenants_idle_streams_do_not_shut_out_another(keys):
    async with gateway(keys, max_streams=8) as (app, http):
        for tenant in ("acme", "rival"):
            made = await http.put("/collections/books", headers=keys[tenant])
            assert made.status_code == 201
        ours, theirs = {**keys["acme"], **NDJSON}, {**keys["rival"], **NDJSON}
        line = b'{"id": "a", "text": "b"}\n'
        async with unfinished(12, app, DOCUMENTS, ours, b"\n" * 1000) as told:
            assert (told.count(None), set(told)) == (4, {None, 429})
            answer = await http.post(DOCUMENTS, content=line, headers=theirs)
            assert answer.status_code == 202, answer.text
        answer = await http.post(DOCUMENTS, content=line, headers=ours)
        assert answer.status_code == 202


def test_a_body_must_fit_into_one_tenants_share():
    with pytest.raises(ConfigError, match="max_body_bytes"):
        GatewayConfig("unused", no_keys=True, max_body_bytes=200 << 20).checked()
