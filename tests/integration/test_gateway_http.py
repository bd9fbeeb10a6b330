"""The gateway on a real socket over a real Redis, with a worker by hand behind it."""

import asyncio
import json
import os
import signal
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import cohere
import httpx
import openai
import pytest
from gateway_responder import CARD, Responder, vector
from servers import address_of, eventually

from vecfleet.common import codec, keys
from vecfleet.common.admission import Admission
from vecfleet.common.collection import Collection, CollectionSpec
from vecfleet.common.redis_client import connect_async
from vecfleet.gateway.config import GatewayConfig, GatewayLimits
from vecfleet.gateway.main import serve

DOCUMENTS = "/collections/books/documents"
NDJSON = {"content-type": "application/x-ndjson"}
EMBED_LIST = keys.queue_list(keys.embed_queue(CARD.space, "interactive"))
BULK_LIST = keys.queue_list(keys.embed_queue(CARD.space, "bulk"))


@dataclass
class Served:
    port: int
    http: httpx.AsyncClient

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    async def connect(self):
        return await asyncio.open_connection("127.0.0.1", self.port)


@asynccontextmanager
async def gateway(redis_url, **settings):
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.setblocking(False)
    port = listener.getsockname()[1]
    config = GatewayConfig(redis_url=redis_url, **{"drain_s": 1.0, **settings})
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(config, listener, stop))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:

            async def answers():
                if serving.done():
                    serving.result()
                try:
                    return await http.get("/v1/models")
                except httpx.TransportError:
                    return None

            await eventually(answers, what="an answer of the gateway")
            yield Served(port, http)
    finally:
        stop.set()
        await asyncio.wait([serving], timeout=30)
        if not serving.done():
            stacks = [f"{task}\n{task.get_stack()}" for task in asyncio.all_tasks()]
            pytest.fail("the gateway does not stop:\n" + "\n".join(stacks))
        serving.result()


@pytest.fixture
async def responder(redis_async):
    async with Responder(redis_async) as responder:
        yield responder


@pytest.fixture
async def served(redis_url, responder):
    async with gateway(redis_url) as served:
        yield served


async def make_collection(client, name="books"):
    spec = CollectionSpec(CARD.name, CARD.space, CARD.dimension)
    record = Collection(name, "ab" * 16, spec)
    await client.hset(keys.collections(), name, codec.dumps(record.to_wire()))
    await client.set(keys.PUBLISHED, 1)


def sdk(served, **options):
    return openai.AsyncOpenAI(
        api_key="none", base_url=f"{served.url}/v1", **{"max_retries": 0, **options}
    )


# The official SDKs


async def test_openai_sdk_embeds_and_lists_models(served):
    async with sdk(served) as client:
        one = await client.embeddings.create(model=CARD.name, input="hello")
        many = await client.embeddings.create(
            model=CARD.name, input=["a", "b"], encoding_format="float", user="u"
        )
        listed = [model.id async for model in client.models.list()]
        found = await client.models.retrieve(CARD.name)
    assert one.data[0].embedding == pytest.approx(list(memoryview(vector("hello")).cast("f")))
    assert [row.index for row in many.data] == [0, 1]
    assert many.data[1].embedding == pytest.approx(list(memoryview(vector("b")).cast("f")))
    assert many.usage.total_tokens == 2
    assert listed == [CARD.name]
    assert found.id == CARD.name


async def test_openai_sdk_sees_its_own_errors(served):
    async with sdk(served) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.embeddings.create(model=CARD.name, input=[1, 2, 3])
        with pytest.raises(openai.NotFoundError) as missing:
            await client.embeddings.create(model="other", input="a")
        with pytest.raises(openai.BadRequestError) as dimensions:
            await client.embeddings.create(model=CARD.name, input="a", dimensions=3)
    assert (bad.value.param, bad.value.code) == ("input", "invalid_input")
    assert bad.value.request_id == bad.value.body["request_id"]
    assert missing.value.code == "model_not_found"
    assert dimensions.value.param == "dimensions"


async def test_openai_sdk_waits_out_a_full_queue(redis_url, redis_async, responder):
    async with (
        gateway(redis_url, admission=Admission(max_tokens=50)) as served,
        sdk(served) as client,
        sdk(served, max_retries=5) as patient,
    ):
        await responder.hold()
        first = asyncio.create_task(client.embeddings.create(model=CARD.name, input="x" * 150))
        await eventually(lambda: redis_async.llen(EMBED_LIST))
        with pytest.raises(openai.RateLimitError) as full:
            await client.embeddings.create(model=CARD.name, input="y" * 150)
        waiting = asyncio.create_task(patient.embeddings.create(model=CARD.name, input="y" * 150))
        responder.go.set()
        assert (await first).data
        assert (await waiting).data
    assert full.value.code == "queue_full"
    assert int(full.value.response.headers["retry-after"]) >= 1


async def test_cohere_sdk_reranks_in_both_versions(served):
    texts = ["blue", "green red", "red"]
    async with cohere.AsyncClientV2(api_key="none", base_url=served.url) as v2:
        two = await v2.rerank(model=CARD.name, query="red green", documents=texts, top_n=2)
    async with cohere.AsyncClient(api_key="none", base_url=served.url) as v1:
        one = await v1.rerank(
            model=CARD.name, query="red green", documents=texts, return_documents=True
        )
    assert [(row.index, row.relevance_score) for row in two.results] == [(1, 1.0), (2, 0.5)]
    assert two.meta.billed_units.search_units == 1
    assert one.results[0].document.text == "green red"


# Clients that go away, and those that never end


async def test_disconnect_cancels_the_job(served, redis_async, responder):
    await responder.hold()
    _, writer = await served.connect()
    body = json.dumps({"input": "nobody waits for this"}).encode()
    writer.write(
        b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
        + body
    )
    (job_id,) = await eventually(lambda: redis_async.lrange(EMBED_LIST, 0, -1))
    assert await redis_async.exists(keys.job(job_id.decode()))
    writer.close()
    await eventually(lambda: _gone(redis_async, keys.job(job_id.decode())))
    load = await redis_async.hget(keys.load(keys.embed_queue(CARD.space, "interactive")), "tokens")
    assert int(load or 0) == 0


async def _gone(client, key):
    return not await client.exists(key)


async def test_slow_and_endless_clients_are_cut_off_and_others_are_served(redis_url, responder):
    limits = GatewayLimits(
        header_timeout_s=0.3,
        body_grace_s=0.3,
        max_header_bytes=8192,
        max_inference_body_bytes=1 << 20,
    )
    async with gateway(redis_url, limits=limits) as served:
        silent = [await served.connect() for _ in range(20)]
        slow_head = await served.connect()
        slow_head[1].write(b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\n")
        slow_body = await served.connect()
        slow_body[1].write(
            b'POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{"in'
        )
        endless_head = await served.connect()
        endless_head[1].write(b"GET / HTTP/1.1\r\nx: " + b"a" * 20_000)
        healthy = await served.http.post("/v1/embeddings", json={"input": "healthy"})
        assert healthy.status_code == 200
        async with asyncio.timeout(20):
            for reader, _ in [*silent, slow_head]:
                assert await reader.read() == b""
            assert b" 408 " in (await slow_body[0].read()).split(b"\r\n")[0]
            assert b" 400 " in (await endless_head[0].read()).split(b"\r\n")[0]
        for _, writer in [*silent, slow_head, slow_body, endless_head]:
            writer.close()


@pytest.mark.parametrize("path", ["/v1/embeddings", "/nowhere"])
async def test_endless_body_gets_an_answer_and_is_closed(served, path):
    reader, writer = await served.connect()
    writer.write(
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    )
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"

    async def pour():
        with pytest.raises((ConnectionError, OSError)):
            while True:
                writer.write(chunk)
                await writer.drain()
                await asyncio.sleep(0)

    pouring = asyncio.create_task(pour())
    async with asyncio.timeout(30):
        status = await reader.readline()
        await pouring
    assert status.split()[1] == (b"413" if path.startswith("/v1") else b"404")
    writer.close()


@pytest.mark.parametrize("size", [9 << 20, 60 << 20])
async def test_a_client_that_sends_too_much_still_reads_why(served, size, monkeypatch):
    monkeypatch.setattr("vecfleet.gateway.door._LINGER_S", 30.0)

    async def parts():
        for _ in range(size >> 20):
            yield b"x" * (1 << 20)

    for content in (parts(), b"x" * size):
        answer = await served.http.post("/v1/embeddings", content=content)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


async def test_streams_are_limited(redis_url, redis_async, responder):
    await make_collection(redis_async)
    async with gateway(redis_url, limits=GatewayLimits(max_streams=1)) as served:
        go_on = asyncio.Event()

        async def rows():
            yield b'{"id": "a", "text": "b"}\n' * 300
            await go_on.wait()

        first = asyncio.create_task(served.http.post(DOCUMENTS, content=rows(), headers=NDJSON))
        await eventually(lambda: _any(redis_async, "vf:sub:*"))
        second = await served.http.post(DOCUMENTS, content=b"", headers=NDJSON)
        go_on.set()
        assert (await first).status_code == 202
        third = await served.http.post(DOCUMENTS, content=b"", headers=NDJSON)
    assert second.status_code == 429
    assert third.status_code == 202


async def _any(client, pattern):
    return [key async for key in client.scan_iter(pattern)]


# Documents on their way in


async def test_documents_become_the_jobs_of_one_submission(served, redis_async):
    await make_collection(redis_async)
    rows = [json.dumps({"id": f"d{i}", "text": f"text {i}"}).encode() for i in range(600)]

    async def stream():
        for row in rows:
            yield row + b"\n"

    said = (await served.http.post(DOCUMENTS, content=stream(), headers=NDJSON)).json()
    waiting = [job.decode() for job in await redis_async.lrange(BULK_LIST, 0, -1)]
    assert waiting == [f"{said['submission_id']}-{place}" for place in range(3)]
    data = await redis_async.hget(keys.job(waiting[2]), "data")
    _, (payload,), _ = codec.unpack_call(data)
    assert payload["ids"] == [f"d{i}" for i in range(512, 600)]
    seen = (await served.http.get(f"/submissions/{said['submission_id']}")).json()
    assert (seen["state"], seen["documents"], seen["pending"]) == ("closed", 600, 600)


async def test_the_same_key_sent_again_adds_nothing(served, redis_async):
    await make_collection(redis_async)
    headers = {**NDJSON, "idempotency-key": "import-7"}
    rows = b"\n".join(b'{"id": "d%d", "text": "t"}' % i for i in range(300))
    said = [
        (await served.http.post(DOCUMENTS, content=rows, headers=headers)).json() for _ in range(2)
    ]
    assert said[0] == said[1]
    assert await redis_async.llen(BULK_LIST) == 2


async def test_a_key_does_not_stand_for_two_submissions(served, redis_async):
    await make_collection(redis_async)
    headers = {**NDJSON, "idempotency-key": "import-8"}

    def rows(count, text):
        return b"\n".join(b'{"id": "d%d", "text": "%b"}' % (i, text) for i in range(count))

    first = await served.http.post(DOCUMENTS, content=rows(300, b"t"), headers=headers)
    others = [
        await served.http.post(DOCUMENTS, content=other, headers=headers)
        for other in (rows(300, b"u"), rows(299, b"t"), b'{"id": "x", "text": "t"}')
    ]
    again = await served.http.post(DOCUMENTS, content=rows(300, b"t"), headers=headers)
    assert (first.status_code, again.status_code) == (202, 202)
    for other in others:
        assert other.status_code == 409
        assert other.json()["error"]["field"] == "Idempotency-Key"
    assert await redis_async.llen(BULK_LIST) == 2


async def test_a_stream_that_breaks_off_ends_with_what_it_brought(served, redis_async):
    await make_collection(redis_async)
    _, writer = await served.connect()
    row = b'{"id": "a", "text": "b"}\n'
    writer.write(
        f"POST {DOCUMENTS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\n"
        f"content-length: 999999\r\n\r\n".encode()
        + row * 300
    )
    await eventually(lambda: redis_async.llen(BULK_LIST))
    writer.close()
    (job,) = await redis_async.lrange(BULK_LIST, 0, -1)
    key = keys.submission(job.decode().rsplit("-", 1)[0])

    async def closed():
        return await redis_async.hget(key, "state") == b"closed"

    await eventually(closed)
    assert await redis_async.hget(key, "documents") == b"256"


async def test_a_full_queue_stops_a_stream_with_what_was_taken(redis_url, redis_async, responder):
    await make_collection(redis_async)
    rows = b"\n".join(b'{"id": "d%d", "text": "t"}' % i for i in range(1000))
    async with gateway(
        redis_url,
        admission=Admission(max_tokens=1500),
        limits=GatewayLimits(queue_full_wait_s=0.1),
    ) as served:
        answer = await served.http.post(DOCUMENTS, content=rows, headers=NDJSON)
    said = answer.json()
    assert answer.status_code == 429
    assert said["error"]["code"] == "queue_full"
    assert said["accepted"] == 256 * await redis_async.llen(BULK_LIST)
    assert said["next_line"] == said["accepted"] + 1


async def test_cancelling_a_submission_is_seen_by_the_queue(served, redis_async):
    await make_collection(redis_async)
    said = (await served.http.post(DOCUMENTS, json={"id": "a", "text": "b"})).json()
    cancelled = await served.http.delete(f"/submissions/{said['submission_id']}")
    again = await served.http.post(DOCUMENTS, json={"id": "a", "text": "b"})
    assert cancelled.json()["state"] == "cancelled"
    assert again.status_code == 202


# The process


async def test_metrics_and_health_read_redis(served, redis_async):
    await make_collection(redis_async)
    await served.http.post(DOCUMENTS, json={"id": "a", "text": "b c"})
    text = (await served.http.get("/metrics")).text
    queue = str(keys.embed_queue(CARD.space, "bulk"))
    assert f'vecfleet_queue_jobs{{queue="{queue}"}} 1.0' in text
    assert f'vecfleet_model_workers{{model="{CARD.name}"}} 1.0' in text
    health = await served.http.get("/health")
    assert health.json()["model_loaded"] is True


async def test_many_at_once_are_all_answered(served):
    async def ask(i):
        answer = await served.http.post("/v1/embeddings", json={"input": f"text {i}"})
        row = answer.json()["data"][0]["embedding"]
        assert row == pytest.approx(list(memoryview(vector(f"text {i}")).cast("f")))

    await asyncio.gather(*(ask(i) for i in range(100)))


async def test_redis_that_goes_away_is_a_503_until_it_is_back(redis_server_factory):
    server = redis_server_factory()
    with server.client() as client:
        client.set(keys.PUBLISHED, 1)
    async with gateway(server.url) as served:
        server.stop()
        lost = await served.http.get("/collections")
        server.start()

        async def back():
            return (await served.http.get("/collections")).status_code == 200

        await eventually(back)
    assert lost.status_code == 503
    assert lost.json()["error"]["code"] == "redis_unavailable"
    assert "retry-after" in lost.headers


async def test_each_redis_version_will_do(each_redis_binary, redis_server_factory):
    server = redis_server_factory(binary=each_redis_binary)
    async with (
        connect_async(server.url) as client,
        Responder(client),
        gateway(server.url) as served,
    ):
        await make_collection(client)
        embedded = await served.http.post("/v1/embeddings", json={"input": ["a", "b"]})
        sent = await served.http.post(
            DOCUMENTS, content=b'{"id": "a", "text": "b"}', headers=NDJSON
        )
        seen = await served.http.get(f"/submissions/{sent.json()['submission_id']}")
        metrics = await served.http.get("/metrics")
    assert embedded.status_code == 200
    assert seen.json()["documents"] == 1
    assert "vecfleet_redis_up 1.0" in metrics.text


async def test_sigterm_lets_requests_in_flight_finish(redis_url, redis_async, responder, run_role):
    await responder.hold()
    process = run_role("gateway", "--redis", redis_url, "--port", "0", "--no-keys")
    url = await asyncio.to_thread(address_of, process)
    async with httpx.AsyncClient(base_url=url, timeout=30) as http:
        asked = asyncio.create_task(http.post("/v1/embeddings", json={"input": "late"}))
        await eventually(lambda: redis_async.llen(EMBED_LIST))
        os.kill(process.pid, signal.SIGTERM)
        responder.go.set()
        assert (await asked).status_code == 200
    assert await asyncio.to_thread(process.wait) == 0


def test_no_redis_ends_the_start_with_a_reason(run_role):
    from vecfleet.gateway.main import run_gateway

    config = GatewayConfig(redis_url="redis://127.0.0.1:1", redis_wait_s=0.0, no_keys=True)
    assert run_gateway(config) == 3  # Redis may come: whoever keeps it up tries again
    assert run_gateway(replace(config, no_keys=False)) == 1
