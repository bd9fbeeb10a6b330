"""Bodies that are large, nested, slow, broken or endless; request ids; the last line of defence."""

import asyncio
import contextlib
import json
import tracemalloc
from types import SimpleNamespace

import httpx
import pytest
from gateway_fakes import FakeFleet, gateway_client

from vecfleet.common.errors import BY_CODE, ConfigError
from vecfleet.gateway import body
from vecfleet.gateway.app import create_app
from vecfleet.gateway.config import GatewayConfig, GatewayLimits

PATH = "/v1/embeddings"
DOCUMENTS = "/collections/books/documents"
TINY = GatewayLimits(max_inference_body_bytes=1000)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[" * 10_000_000,
        b'{"input":' * 500_000,
        b'{"input": "a", "model": ' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"input": "\xff\xfe"}',
        b'{"input": "\\ud800"}',
        b'{"input": NaN}',
        b'{"input": 1e999}',
        b'{"input": "a"',
        b'["a"]',
        b'"a"',
        b"null",
        b"\x00\x01\x02",
    ],
    ids=lambda raw: raw[:12].decode("latin-1") or "empty",
)
async def test_bodies_that_are_no_json_object_get_a_400(raw):
    fleet = FakeFleet()
    limits = GatewayLimits(max_inference_body_bytes=16 << 20)
    async with gateway_client(fleet, limits) as client:
        answer = await client.post(PATH, content=raw)
        after = await client.post(PATH, json={"input": "a"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in ("body", "input")
    assert after.status_code == 200


async def test_declared_length_is_checked_before_a_byte_is_read():
    async with gateway_client(FakeFleet(), TINY) as client:
        answer = await client.post(PATH, content=b"x" * 1001)
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"
    assert answer.json()["error"]["code"] == "body_too_large"


async def test_chunked_bodies_are_counted():
    sent = 0

    async def chunks():
        nonlocal sent
        for _ in range(100):
            sent += 300
            yield b"x" * 300

    async with gateway_client(FakeFleet(), TINY) as client:
        answer = await client.post(PATH, content=chunks())
    assert answer.status_code == 413


async def call(app, headers, receive, path=PATH):
    """One raw ASGI request; returns the messages that the app sent."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    await app(scope, receive, send)
    return sent


def app_over(fleet, **limits):
    return create_app(fleet, GatewayConfig(redis_url="unused", limits=GatewayLimits(**limits)))


async def test_slow_body_is_told_so():
    async def receive():
        await asyncio.Event().wait()

    sent = await call(
        app_over(FakeFleet(), body_grace_s=0.05), [(b"content-length", b"10")], receive
    )
    assert sent[0]["status"] == 408


async def test_dripping_body_is_not_given_more_time_than_its_bytes_earn(monkeypatch):
    now_s = 0.0
    messages = 0

    async def receive():
        nonlocal now_s, messages
        await asyncio.sleep(0)  # where a deadline that has passed ends it
        now_s += 2.0
        messages += 1
        if messages > 4:  # also what follows the answer is read for a while
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": b" ", "more_body": True}

    monkeypatch.setattr(body, "time", SimpleNamespace(perf_counter=lambda: now_s))
    app = app_over(FakeFleet(), body_grace_s=5.0, min_body_bytes_per_s=10.0)
    sent = await call(app, [(b"transfer-encoding", b"chunked")], receive)
    assert sent[0]["status"] == 408  # after three bytes in 6 s: the grace and they allow 5.3


@pytest.mark.parametrize(
    ("path", "kind", "part"),
    [
        (PATH, b"application/json", b"x" * 100_000),  # much of it buys no longer silence
        (PATH, b"application/json", b" " * 10),
        (DOCUMENTS, b"application/x-ndjson", b'{"id": "a", "text": "b"}\n' * 1000),
        (DOCUMENTS, b"application/x-ndjson", b"\n" * 10_000),
    ],
)
async def test_silence_is_bounded_whatever_was_sent_before(path, kind, part):
    fleet = FakeFleet()
    await fleet.create_collection("books", tenant="-")
    parts = [part]

    async def receive():
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": True}
        return await asyncio.Event().wait()

    app = app_over(fleet, body_grace_s=0.05, stream_grace_s=0.05, min_body_bytes_per_s=1)
    headers = [(b"content-type", kind), (b"transfer-encoding", b"chunked")]
    async with asyncio.timeout(30):
        sent = await call(app, headers, receive, path)
    assert sent[0]["status"] == 408


@pytest.mark.parametrize("blank", [b"\n", b" \r\n\t"])
async def test_blank_lines_do_not_keep_a_stream_open(monkeypatch, blank):
    now_s = 0.0
    sent_parts = 0

    async def receive():
        nonlocal now_s, sent_parts
        await asyncio.sleep(0)
        now_s += 1.0
        sent_parts += 1
        if sent_parts > 60:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": blank * 1000, "more_body": True}

    monkeypatch.setattr(body, "time", SimpleNamespace(perf_counter=lambda: now_s))
    fleet = FakeFleet()
    await fleet.create_collection("books", tenant="-")
    headers = [(b"content-type", b"application/x-ndjson"), (b"transfer-encoding", b"chunked")]
    sent = await call(app_over(fleet, stream_grace_s=5.0), headers, receive, DOCUMENTS)
    assert sent[0]["status"] == 408


async def test_endless_body_nobody_asked_for_is_cut_off():
    received = 0

    async def receive():
        nonlocal received
        received += 1 << 20
        return {"type": "http.request", "body": b"x" * (1 << 20), "more_body": True}

    sent = await call(
        app_over(FakeFleet(), max_inference_body_bytes=1 << 20),
        [(b"transfer-encoding", b"chunked")],
        receive,
    )
    assert sent[0]["status"] == 413
    assert (b"connection", b"close") in sent[0]["headers"]
    assert received < 80 << 20


async def test_all_bodies_together_are_bounded_and_given_back():
    fleet = FakeFleet()
    fleet.hang = True
    text = {"input": "x" * 3000}
    async with gateway_client(fleet, GatewayLimits(max_buffered_bytes=5000)) as client:
        first = asyncio.create_task(client.post(PATH, json=text))
        while not fleet.calls:
            await asyncio.sleep(0)
        second = await client.post(PATH, json=text)
        fleet.stuck.set()
        assert (await first).status_code == 200
        third = await client.post(PATH, json=text)
    assert second.status_code == 503
    assert second.headers["retry-after"] == "1"
    assert third.status_code == 200


async def test_a_body_of_tiny_parts_takes_about_its_bytes():
    raw = json.dumps({"input": "x" * 100_000}).encode()
    left = [raw[at : at + 2] for at in range(0, len(raw), 2)]
    left.reverse()
    held = []

    async def receive():
        await asyncio.sleep(0)
        part = left.pop()
        if len(left) % 10_000 == 1:
            held.append(tracemalloc.get_traced_memory()[0])
        return {"type": "http.request", "body": bytes(bytearray(part)), "more_body": bool(left)}

    tracemalloc.start()
    try:
        sent = await call(app_over(FakeFleet()), [(b"transfer-encoding", b"chunked")], receive)
    finally:
        tracemalloc.stop()
    assert sent[0]["status"] == 200
    assert max(held) - held[0] < 8 * len(raw)


async def test_client_that_goes_away_cancels_its_call():
    fleet = FakeFleet()
    fleet.hang = True
    gone = asyncio.Event()
    messages = [{"type": "http.request", "body": b'{"input":"a"}', "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    headers = [(b"content-length", b"13")]
    request = asyncio.create_task(call(app_over(fleet), headers, receive))
    while not fleet.calls:
        await asyncio.sleep(0)
    gone.set()
    async with asyncio.timeout(30):
        await fleet.cancelled.wait()
        assert await request == []


async def test_server_that_stops_still_cancels():
    fleet = FakeFleet()
    fleet.hang = True

    async def receive():
        return {"type": "http.request", "body": b'{"input":"a"}', "more_body": False}

    headers = [(b"content-length", b"13")]
    request = asyncio.create_task(call(app_over(fleet), headers, receive))
    while not fleet.calls:
        await asyncio.sleep(0)
    request.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await request
    assert request.cancelled()


async def test_compressed_bodies_are_refused_clearly():
    async with gateway_client(FakeFleet()) as client:
        answer = await client.post(PATH, content=b"x", headers={"content-encoding": "gzip"})
    assert answer.status_code == 400
    assert "content-encoding" in answer.json()["error"]["message"]


async def test_safe_request_ids_are_kept_and_others_replaced():
    async with gateway_client(FakeFleet()) as client:
        kept = await client.get("/v1/models", headers={"x-request-id": "trace-1.a_B"})
        replaced = await client.get("/v1/models", headers={"x-request-id": 'a" b\tc'})
        long = await client.get("/v1/models", headers={"x-request-id": "a" * 200})
    assert kept.headers["x-request-id"] == "trace-1.a_B"
    assert len(replaced.headers["x-request-id"]) == 32
    assert len(long.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("PATCH", "/collections", 405, "method_not_allowed"),
        ("GET", "/collections/%2e%2e/documents/1", 400, "invalid_name"),
        ("GET", "/collections/..%2f..%2fetc", 404, "not_found"),
        ("GET", "/collections/a%00b", 400, "invalid_name"),
        ("GET", "/collections/%D0%B0", 400, "invalid_name"),
        ("GET", "/collections/.hidden", 400, "invalid_name"),
        ("GET", "/submissions/%2e%2e", 404, "submission_not_found"),
        ("GET", "/submissions/a*b", 404, "submission_not_found"),
    ],
)
async def test_odd_paths_get_typed_errors(method, path, status, code):
    async with gateway_client(FakeFleet()) as client:
        request = client.build_request(method, "http://localhost/")
        request.url = request.url.copy_with(raw_path=path.encode())
        answer = await client.send(request)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code


async def test_every_error_code_has_one_status_and_an_answer():
    for code, cls in BY_CODE.items():
        fleet = FakeFleet()
        fleet.fail = cls()
        async with gateway_client(fleet) as client:
            answer = await client.post(PATH, json={"input": "a"})
        assert answer.status_code == cls.http_status, code
        assert answer.json()["error"]["code"] == code
        assert ("retry-after" in answer.headers) == (cls.http_status in (429, 503))


async def test_websockets_are_closed():
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "websocket.connect"}

    await app_over(FakeFleet())({"type": "websocket", "path": "/", "headers": []}, receive, send)
    assert sent[0]["type"] == "websocket.close"


def test_a_config_names_all_its_faults_and_hides_its_url():
    config = GatewayConfig(
        redis_url="redis://:hunter2@somewhere", port=70000, limits=GatewayLimits(max_top_k=0)
    )
    with pytest.raises(ConfigError) as caught:
        config.checked()
    assert "70000" in str(caught.value)
    assert "max_top_k" in str(caught.value)
    assert "hunter2" not in repr(config)


async def test_openapi_tells_of_every_route():
    app = app_over(FakeFleet())
    paths = app.openapi()["paths"]
    for path in ("/v1/embeddings", "/v2/rerank", "/collections/{collection}/documents", "/metrics"):
        assert path in paths
    schema = paths["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["input"]
    named = [p["name"] for p in paths["/collections/{collection}/search"]["post"]["parameters"]]
    assert named == ["collection"]
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://localhost"
    ) as client:
        assert (await client.get("/openapi.json")).status_code == 200


def test_openapi_declares_what_every_route_answers():
    document = app_over(FakeFleet()).openapi()
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            good, *errors = sorted(operation["responses"].items())
            for content in good[1]["content"].values():
                assert content["schema"], f"{method} {path} does not say what it answers"
            told = {code for code, _ in errors}
            assert "500" in told
            if path not in ("/health", "/live"):
                assert {"400", "401", "403", "404", "429", "503", "504"} <= told
            for code, error in errors:
                (content,) = error["content"].values()
                if (path, code) != ("/health", "503"):
                    assert content["schema"]["$ref"].rpartition("/")[2] in schemas
