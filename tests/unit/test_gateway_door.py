"""Who passes the gateway's door, and what each may do behind it."""

import asyncio
import json
import logging

import pytest
from fastapi.routing import APIRoute
from gateway_fakes import FakeFleet, gateway_client

from vecfleet.common.api_keys import SCOPES, add_key, new_key
from vecfleet.common.errors import ConfigError
from vecfleet.common.settings import Settings
from vecfleet.fleet.door import check_door
from vecfleet.fleet.up import Fleet, FleetOptions
from vecfleet.gateway.app import create_app
from vecfleet.gateway.config import GatewayConfig, GatewayLimits, is_loopback
from vecfleet.gateway.identity import OPEN_PATHS
from vecfleet.gateway.keyring import GONE_S, Keyring
from vecfleet.gateway.origin import fault_in

METHODS = ("get", "post", "put", "delete", "patch", "head", "options")
FILLED = {"collection": "books", "submission": "0" * 32, "document": "d1", "model": "m"}
FILLED |= {"entry": "0" * 32}


class Rig:
    """A gateway with keys over a fleet in memory."""

    def __init__(self, http, fleet, path):
        self.http, self.fleet, self.path = http, fleet, path

    def key(self, *scopes, tenant="-", **options):
        shown, entry = new_key(tenant, scopes or SCOPES, **options)
        add_key(self.path, entry)
        return shown

    async def ask(self, method, path, key=None, **options):
        headers = {"authorization": f"Bearer {key}"} if key else {}
        headers |= options.pop("headers", {})
        return await self.http.request(method, path, headers=headers, **options)


@pytest.fixture
async def rig(tmp_path, monkeypatch):
    monkeypatch.setattr("vecfleet.gateway.keyring.LOOK_S", 0.0)
    path = tmp_path / "keys.json"
    add_key(path, new_key()[1])
    fleet = FakeFleet()
    async with gateway_client(fleet, keys_file=path) as http:
        yield Rig(http, fleet, path)


def all_operations():
    app = create_app(FakeFleet(), GatewayConfig("unused"))
    return [
        pytest.param(method, path, operation, id=f"{method} {path}")
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
        if method in METHODS
    ]


def filled(path):
    return path.format(**FILLED)


def test_the_document_has_every_route():
    app = create_app(FakeFleet(), GatewayConfig("unused"))
    served = {
        (method.lower(), route.path.replace(":path", ""))
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert served == {(p.values[0], p.values[1]) for p in all_operations()}


@pytest.mark.parametrize(("method", "path", "operation"), all_operations())
def test_every_route_declares_its_scopes(method, path, operation):
    scopes = operation.get("x-scopes")
    assert scopes is not None, "a route without declared scopes takes an administrator: declare one"
    assert set(scopes) <= set(SCOPES)
    if path in OPEN_PATHS:
        assert operation["security"] == []
        assert scopes == []


@pytest.mark.parametrize(("method", "path", "operation"), all_operations())
async def test_no_route_answers_without_a_key(rig, method, path, operation):
    unknown, _ = new_key()
    for key in (None, unknown, "vf_", "nonsense"):
        answer = await rig.ask(method, filled(path), key, content=b"{}")
        if path in OPEN_PATHS:
            assert answer.status_code == 200
        else:
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(("method", "path", "operation"), all_operations())
async def test_a_key_without_the_scope_is_refused(rig, method, path, operation):
    scopes = operation["x-scopes"]
    if not scopes:
        answer = await rig.ask(method, filled(path), rig.key("embed"))
        assert answer.status_code in (200, 404)
        return
    lacking = [scope for scope in SCOPES if scope not in scopes]
    answer = await rig.ask(method, filled(path), rig.key(*lacking), content=b"{}")
    assert answer.status_code == 403
    for scope in scopes:
        answer = await rig.ask(method, filled(path), rig.key(scope), content=b"{}")
        assert answer.status_code not in (401, 403), scope


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/nowhere", "//health", "/"])
async def test_paths_that_are_no_operations_need_a_key_too(rig, path):
    assert (await rig.ask("GET", path)).status_code == 401
    assert (await rig.ask("GET", path, rig.key("embed"))).status_code in (200, 404)


@pytest.mark.parametrize(
    "form",
    [
        lambda key: {"authorization": f"Bearer {key}"},
        lambda key: {"Authorization": f"bearer   {key} "},
        lambda key: {"X-API-Key": key},
        lambda key: {"x-api-key": key, "authorization": f"Bearer {key}"},
        lambda key: {"x-api-key": key, "authorization": "Basic cHJveHk6cHJveHk="},
    ],
)
async def test_the_ways_to_send_a_key(rig, form):
    answer = await rig.ask("GET", "/v1/models", headers=form(rig.key()))
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "form",
    [
        lambda key: {"authorization": key},
        lambda key: {"authorization": f"Basic {key}"},
        lambda key: {"authorization": "Bearer "},
        lambda key: {"authorization": f"Bearer {key} {key}"},
        lambda key: {"cookie": f"key={key}"},
        lambda key: {"x-api-key": f"{key}x"},
        lambda key: {"x-api-key": key * 9},
        lambda key: {"x-api-key": key.encode() + b"\xff"},
        lambda key: {"x-api-key": new_key()[0], "authorization": f"Bearer {key}"},
    ],
)
async def test_what_is_no_key(rig, form):
    answer = await rig.ask("GET", "/v1/models", headers=form(rig.key()))
    assert answer.status_code == 401


async def test_a_key_in_the_query_is_no_key(rig):
    assert (await rig.ask("GET", f"/v1/models?api_key={rig.key()}")).status_code == 401


async def test_unknown_wrong_ended_and_revoked_keys_get_one_answer(rig):
    good = rig.key()
    ended = rig.key(expires_at=1)
    wrong = good[:-1] + ("0" if good[-1] != "0" else "1")
    bodies = set()
    for key in (new_key()[0], ended, wrong, "short"):
        answer = await rig.ask("GET", "/collections", key, headers={"x-request-id": "r"})
        assert answer.status_code == 401
        bodies.add(answer.content)
    assert len(bodies) == 1


async def test_each_shape_of_error_is_kept(rig):
    openai = (await rig.ask("POST", "/v1/embeddings", content=b"{}")).json()
    tei = (await rig.ask("POST", "/embed", content=b"{}")).json()
    ours = (await rig.ask("GET", "/collections")).json()
    assert openai["error"]["code"] == "unauthorized"
    assert tei["error_type"]
    assert ours["error"]["code"] == "unauthorized"


async def test_keys_change_without_a_restart(rig):
    key = rig.key("search")
    assert (await rig.ask("GET", "/collections", key)).status_code == 200
    from vecfleet.common.api_keys import id_of, remove_key

    remove_key(rig.path, id_of(key))
    assert (await rig.ask("GET", "/collections", key)).status_code == 401


def test_a_file_that_stays_away_means_nobody(tmp_path):
    path, now_s = tmp_path / "keys.json", 0.0
    shown, entry = new_key()
    add_key(path, entry)
    keyring = Keyring(path, clock=lambda: now_s)
    kept = path.rename(tmp_path / "elsewhere.json")
    for step_s, is_good in ((1.0, True), (GONE_S - 1, True), (1.0, False), (1.0, False)):
        now_s += step_s
        assert bool(keyring.find(shown)) == is_good
    kept.rename(path)
    now_s += 1.0
    assert keyring.find(shown)
    path.unlink()
    now_s += 1.0
    assert keyring.find(shown), "it counts from anew"


# Tenants


async def test_a_tenant_sees_its_own_collections_only(rig):
    ours, theirs = rig.key(tenant="acme"), rig.key(tenant="rival")
    assert (await rig.ask("PUT", "/collections/books", ours)).status_code == 201
    assert (await rig.ask("GET", "/collections/books", ours)).status_code == 200
    listed = (await rig.ask("GET", "/collections", ours)).json()["collections"]
    assert [entry["name"] for entry in listed] == ["books"]
    for key in (theirs, rig.key()):
        assert (await rig.ask("GET", "/collections", key)).json() == {"collections": []}
        for method, path, body in (
            ("GET", "/collections/books", None),
            ("DELETE", "/collections/books", None),
            ("POST", "/collections/books/search", {"query": "a"}),
            ("POST", "/collections/books/documents", {"id": "a", "text": "b"}),
            ("GET", "/collections/books/documents/a", None),
            ("DELETE", "/collections/books/documents/a", None),
        ):
            theirs_says = await rig.ask(method, path, key, json=body)
            unknown = await rig.ask(method, path.replace("books", "booky"), key, json=body)
            assert theirs_says.status_code == unknown.status_code == 404, path
            assert theirs_says.json()["error"]["code"] == unknown.json()["error"]["code"]
    assert (await rig.ask("PUT", "/collections/books", theirs)).status_code == 201


async def test_another_tenants_submission_is_as_unknown_as_none(rig):
    ours, theirs = rig.key(tenant="acme"), rig.key(tenant="rival")
    await rig.ask("PUT", "/collections/books", ours)
    sent = await rig.ask(
        "POST", "/collections/books/documents", ours, json={"id": "1", "text": "a"}
    )
    submission = sent.json()["submission_id"]
    assert len(bytes.fromhex(submission)) * 8 == 128
    assert (await rig.ask("GET", f"/submissions/{submission}", ours)).status_code == 200
    for method, tail in (("GET", ""), ("DELETE", ""), ("POST", "/cancel")):
        told = []
        for known in (submission, "0" * 32):
            answer = await rig.ask(
                method, f"/submissions/{known}{tail}", theirs, headers={"x-request-id": "r"}
            )
            assert answer.status_code == 404
            told.append(answer.text.replace(known, "ID"))
        assert told[0] == told[1]
    assert (await rig.ask("GET", f"/submissions/{submission}", ours)).json()["state"] == "closed"


async def test_inference_is_done_in_the_tenants_name(rig):
    key = rig.key(tenant="acme")
    await rig.ask("PUT", "/collections/books", key)
    for path, body in (
        ("/v1/embeddings", {"input": "a"}),
        ("/embed", {"inputs": "a"}),
        ("/v1/rerank", {"query": "a", "documents": ["a"]}),
        ("/v2/rerank", {"query": "a", "documents": ["a"]}),
        ("/rerank", {"query": "a", "texts": ["a"]}),
        ("/collections/books/search", {"query": "a", "rerank": True}),
        ("/search", {"query": "a"}),
    ):
        before = len(rig.fleet.tenants)
        answer = await rig.ask("POST", path, key, json=body)
        assert answer.status_code == 200, (path, answer.text)
        assert set(rig.fleet.tenants[before:]) == {"acme"}, path


async def test_metrics_and_counts_are_the_operators(rig):
    operator, tenant = rig.key("admin"), rig.key("admin", tenant="acme")
    assert (await rig.ask("GET", "/metrics", operator)).status_code == 200
    assert (await rig.ask("GET", "/metrics", tenant)).status_code == 403
    everything = (await rig.ask("GET", "/health", operator)).json()
    assert "documents_indexed" in everything
    for key in (None, tenant, rig.key("search"), "wrong"):
        answer = await rig.ask("GET", "/health", key)
        assert answer.status_code == 200
        assert answer.json().keys() == {"status", "model_loaded", "index_available"}


# Closed by default


LOOPBACK = ["127.0.0.1", "127.8.8.8", "::1", "localhost"]
OTHERS = ["0.0.0.0", "::", "", "10.0.0.1", "example.org", "::ffff:10.0.0.1"]


@pytest.mark.parametrize("host", LOOPBACK + OTHERS)
def test_every_address_needs_keys_or_a_word(host, tmp_path):
    assert is_loopback(host) == (host in LOOPBACK)
    with pytest.raises(ConfigError, match=r"vecfleet keys create.*--no-keys") as refused:
        GatewayConfig("unused", host=host).checked()
    assert "\n" not in str(refused.value)
    GatewayConfig("unused", host=host, keys_file=tmp_path / "keys.json").checked()
    GatewayConfig("unused", host=host, no_keys=True).checked()


def test_a_key_file_and_no_keys_contradict_each_other(tmp_path):
    with pytest.raises(ConfigError, match="contradict"):
        GatewayConfig("unused", keys_file=tmp_path, no_keys=True).checked()


@pytest.mark.parametrize("host", LOOPBACK + [host for host in OTHERS if host])
@pytest.mark.parametrize("has_file", [False, True])
async def test_up_is_open_to_its_own_user_alone(host, has_file, tmp_path):
    if has_file:
        add_key(tmp_path / "keys.json", new_key()[1])
    settings = Settings(host=host, data=tmp_path)
    if host in LOOPBACK or has_file:
        check_door(settings, for_oneself=True)
    else:
        with pytest.raises(ConfigError, match="--no-keys"):
            check_door(settings, for_oneself=True)
    given = Fleet(FleetOptions(settings), lambda name, line: None)._keys()
    file = ["--keys-file", str(tmp_path / "keys.json")]
    assert given == (file if has_file else ["--no-keys"] if host in LOOPBACK else [])


# Pages of others


LOCAL_HOSTS = [b"localhost", b"LocalHost:8000", b"127.0.0.1:8000", b"127.5.5.5", b"[::1]:8000"]
OTHER_HOSTS = [
    b"rebind.evil.example",
    b"rebind.evil.example:8000",
    b"localhost.evil.example",
    b"127.0.0.1.evil.example",
    b"localhost@evil.example",
    b"localhost:8000@evil.example",
    b"[::1].evil.example",
    b"192.168.1.7:8000",
    b"",
    b"\xff",
    b"a" * 10_000,
]
OTHER_ORIGINS = [b"https://evil.example", b"http://evil.example:8000", b"null", b"", b"localhost"]


@pytest.mark.parametrize("host", LOCAL_HOSTS)
@pytest.mark.parametrize(
    "origin", [None, b"http://localhost:3000", b"http://127.0.0.1:8000", b"http://[::1]:8000"]
)
def test_an_open_gateway_answers_to_this_machines_names(host, origin):
    headers = [(b"host", host)] + ([(b"origin", origin)] if origin else [])
    assert fault_in(headers, is_local=True) == ""


def test_programs_that_send_neither_header_are_answered():
    assert fault_in([(b"accept", b"*/*")], is_local=True) == ""


@pytest.mark.parametrize("host", OTHER_HOSTS)
def test_an_open_gateway_answers_to_no_other_name(host):
    assert "keys create" in fault_in([(b"host", host)], is_local=True)
    assert fault_in([(b"host", b"localhost"), (b"host", host)], is_local=True)
    assert fault_in([(b"host", host), (b"sec-fetch-site", b"same-origin")], is_local=True)
    assert fault_in([(b"host", host)], is_local=False) == "", "a proxy may have put it in"


@pytest.mark.parametrize("origin", OTHER_ORIGINS)
@pytest.mark.parametrize("is_local", [True, False])
def test_an_open_gateway_answers_to_nobody_elses_page(origin, is_local):
    headers = [(b"host", b"localhost:8000"), (b"origin", origin)]
    fault = fault_in(headers, is_local=is_local)
    assert "keys create" in fault
    assert len(fault) < 400
    assert fault_in([*headers, (b"sec-fetch-site", b"cross-site")], is_local=is_local) == fault


def test_behind_a_proxy_a_page_of_its_own_site_is_answered():
    own = [(b"host", b"Vectors.example.org"), (b"origin", b"https://vectors.example.org")]
    renamed = [(b"host", b"gateway:8000"), (b"origin", b"https://vectors.example.org")]
    assert fault_in(own, is_local=False) == ""
    assert fault_in(renamed, is_local=False)
    assert fault_in([*renamed, (b"sec-fetch-site", b"same-origin")], is_local=False) == ""


@pytest.mark.parametrize(
    "headers", [{"host": "rebind.evil.example"}, {"origin": "https://evil.example"}]
)
async def test_what_a_foreign_page_sends_is_refused(headers):
    fleet = FakeFleet()
    async with gateway_client(fleet) as http:
        made = await http.put("/collections/books")
        assert made.status_code == 201
        form = {**headers, "content-type": "text/plain"}
        body = b'{"id": "a", "text": "b"}'
        answer = await http.post("/collections/books/documents", content=body, headers=form)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "forbidden"
        assert fleet.blocks == []
        assert (await http.get("/metrics", headers=headers)).status_code == 403
        health = await http.get("/health", headers=headers)
        assert health.json().keys() == {"status", "model_loaded", "index_available"}


async def test_with_keys_the_key_decides_and_not_the_name(rig):
    key = rig.key("embed")
    headers = {"host": "vectors.example.org", "origin": "https://shop.example"}
    assert (await rig.ask("GET", "/v1/models", key, headers=headers)).status_code == 200


# Too many at once


async def test_one_tenants_requests_leave_places_for_others(tmp_path):
    path = tmp_path / "keys.json"
    tenants = {}
    for tenant in ("acme", "rival"):
        shown, entry = new_key(tenant)
        add_key(path, entry)
        tenants[tenant] = {"x-api-key": shown}
    fleet = FakeFleet()
    fleet.hang = True
    limits = GatewayLimits(max_connections=8)
    async with gateway_client(fleet, limits, keys_file=path) as http:

        def ask(tenant):
            asked = http.post("/embed", json={"inputs": "a"}, headers=tenants[tenant])
            return asyncio.create_task(asked)

        async def running(count):
            while len(fleet.calls) < count:
                await asyncio.sleep(0)

        first = [ask("acme") for _ in range(4)]
        await running(4)
        async with asyncio.timeout(30):
            refused = await ask("acme")
        other = ask("rival")
        await running(5)
        assert (await http.get("/live")).status_code == 200
        fleet.stuck.set()
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert {(await task).status_code for task in (*first, other)} == {200}
        assert (await ask("acme")).status_code == 200


async def test_without_a_key_file_nothing_is_asked_for():
    async with gateway_client(FakeFleet()) as http:
        assert (await http.get("/metrics")).status_code == 200
        assert (await http.get("/v1/models", headers={"x-api-key": "any"})).status_code == 200


# What the log says of keys


async def test_the_log_has_the_keys_id_and_no_more(rig, caplog):
    good = rig.key("embed")
    wrong = good[:-1] + ("0" if good[-1] != "0" else "1")
    tried = [good, wrong, new_key()[0], "a-password-of-somebody", good[:40]]
    caplog.set_level(logging.WARNING, "httpx")  # the client's own lines have its URLs
    with caplog.at_level(logging.DEBUG, "vecfleet"):
        for key in tried:
            await rig.ask("GET", "/collections", key)
            await rig.ask("GET", f"/{key}?key={key}", headers={"x-api-key": key, "cookie": key})
    said = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert {line.get("key") for line in said} >= {good.split("_")[1]}
    text = caplog.text + json.dumps(said)
    for key in tried:
        assert key not in text
        assert key.rpartition("_")[2] not in text
