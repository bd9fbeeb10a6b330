"""Others get their turn while one request's documents are checked."""

import asyncio
from types import SimpleNamespace

import httpx
import orjson
import pytest
from gateway_fakes import FakeFleet

from vecfleet.gateway import turns
from vecfleet.gateway.app import create_app
from vecfleet.gateway.config import GatewayConfig

ROWS = [{"id": str(i), "text": "a"} for i in range(200)]  # less than a block
DOCUMENTS = "/collections/books/documents"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", orjson.dumps({"documents": ROWS})),
        ("application/x-ndjson", b"\n".join(map(orjson.dumps, ROWS))),
    ],
    ids=["json", "ndjson"],
)
@pytest.mark.parametrize("each_s", [0.0, 0.005], ids=["cheap", "dear"])
async def test_documents_that_take_long_let_others_go_first(monkeypatch, kind, body, each_s):
    now_s = 0.0
    others = 0

    def clock():
        nonlocal now_s
        now_s += each_s
        return now_s

    async def other():
        nonlocal others
        while True:
            others += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=clock))
    app = create_app(FakeFleet(), GatewayConfig("unused"))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        await client.put("/collections/books")
        beside = asyncio.create_task(other())
        answer = await client.post(DOCUMENTS, content=body, headers={"content-type": kind})
        beside.cancel()
    assert answer.status_code == 202, answer.text
    assert (others > len(ROWS) // 2) == bool(each_s)
