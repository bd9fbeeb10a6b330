"""A share of the HTTP cases against real processes; ``make fuzz`` runs them long."""

import asyncio

import pytest
from fuzz.contract import Broken, Contract
from fuzz.corpus import Request
from fuzz.fleet import live_fleet
from fuzz.http_run import run_http
from fuzz.keys import MINE, Key, make_keys
from fuzz.requests_run import Tally, send_all
from fuzz.stories import Client, get_document, prepare, settle_rival
from fuzz.wire import Answer
from servers import require_or_skip

from vecfleet.common import api_keys

CASES = 1500


@pytest.mark.timeout(300)
def test_no_answer_breaks_the_contract(tmp_path, redis_binary):
    require_or_skip(redis_binary, "redis-server")
    tally, keyring = Tally(), make_keys(tmp_path / "keys.json")
    with live_fleet(tmp_path, tmp_path / "keys.json") as fleet:
        contract = asyncio.run(run_http(fleet, keyring, CASES, 7, tally, outages=False))
        document = asyncio.run(get_document(fleet.port))
    assert not tally.failures, "\n".join(tally.failures[:10])
    assert tally.cases >= CASES
    assert tally.seen_5xx == 0
    assert {200, 201, 202, 400, 401, 403, 404, 405, 422} <= set(tally.statuses)
    assert contract.served and not contract.never_served()
    _refuses_what_is_not_declared(Contract(document))
    _refuses_what_a_key_is_not_for(Contract(document))


@pytest.mark.timeout(120)
def test_a_gateway_that_takes_two_tenants_for_one_is_found_out(tmp_path, redis_binary, monkeypatch):
    require_or_skip(redis_binary, "redis-server")
    made = api_keys.new_key
    monkeypatch.setattr("fuzz.keys.new_key", lambda _, *rest, **more: made(MINE, *rest, **more))
    tally, keyring = Tally(), make_keys(tmp_path / "keys.json")
    with live_fleet(tmp_path, tmp_path / "keys.json") as fleet:
        asyncio.run(_meet(fleet.keyed_port, keyring, tally))
    assert any("of the rival's" in failure for failure in tally.failures), tally.failures[:3]


async def _meet(port, keyring, tally):
    contract = Contract(await get_document(port, keyring.mine))
    mine = Client(port, contract, tally, keyring.mine, keyring)
    await prepare(mine)
    await settle_rival(Client(port, contract, tally, keyring.rival), keyring)
    assert not tally.failures
    await mine.ask("GET", "/collections")


async def test_a_server_that_closes_every_connection_fails():
    async def close(reader, writer):
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0)
    answers = {"200": {"content": {"application/json": {"schema": {}}}}}
    schemas = {name: {"type": "object"} for name in ("Error", "OpenAIError", "TeiError")}
    document = {
        "components": {"schemas": schemas},
        "paths": {"/health": {"get": {"responses": answers}}},
    }
    tally = Tally()
    async with server:
        port = server.sockets[0].getsockname()[1]
        requests = [Request("GET", "/health") for _ in range(50)]
        await send_all(port, Contract(document), requests, tally)
    assert (tally.cases, tally.closed, len(tally.failures)) == (50, 50, 50)


def _refuses_what_is_not_declared(contract):
    """The check itself can fail."""
    good = {"content-type": "application/json"}
    for method, target, answer in (
        ("GET", "/health", Answer(200, good, b'{"status": "fine"}')),
        ("POST", "/v1/embeddings", Answer(500, good, b"{}")),
        ("POST", "/v1/embeddings", Answer(418, good, b"{}")),
        ("POST", "/v1/embeddings", Answer(400, good, b'{"error": "no"}')),
        ("POST", "/embed", Answer(400, good, b"no json")),
        ("GET", "/nowhere", Answer(200, good, b"{}")),
    ):
        with pytest.raises(Broken):
            contract.check(method, target, answer)


def _refuses_what_a_key_is_not_for(contract):
    error = b'{"error": {"code": "c", "message": "m", "field": null, "request_id": "r"}}'
    json_type = {"content-type": "application/json"}
    narrow = Key("a key for embed", "k", frozenset({"embed"}), is_good=True)
    for key, status in ((narrow, 200), (narrow, 404), (narrow, 401), (Key("none", None), 404)):
        with pytest.raises(Broken):
            contract.check("GET", "/collections", Answer(status, json_type, error), key=key)
    full = Key("full", "k", frozenset(api_keys.SCOPES), is_good=True)
    with pytest.raises(Broken):
        contract.check("GET", "/collections", Answer(403, json_type, error), key=full)
    contract.check("GET", "/collections", Answer(403, json_type, error), key=narrow)
