"""Collections, searching them, health and metrics."""

import asyncio

import pytest
from gateway_fakes import FakeFleet, gateway_client
from gateway_responder import CARD, DIMENSION, vector

from vecfleet.common.api_keys import add_key, new_key
from vecfleet.common.errors import InvalidVector, RedisUnavailable
from vecfleet.common.model import ModelCard
from vecfleet.common.vectors import parse_vector
from vecfleet.gateway import health

SEARCH = "/collections/books/search"
TEXTS = {"1": "red apples", "2": "green apples", "3": "blue sky"}


async def filled(client):
    assert (await client.put("/collections/books")).status_code == 201
    rows = [{"id": key, "text": text, "metadata": {"of": key}} for key, text in TEXTS.items()]
    assert (
        await client.post("/collections/books/documents", json={"documents": rows})
    ).status_code == 202


async def test_query_is_embedded_with_the_models_prompt():
    fleet = FakeFleet()
    async with gateway_client(fleet) as client:
        await filled(client)
        answer = await client.post(SEARCH, json={"query": "red apples", "top_k": 2})
    said = answer.json()
    assert fleet.calls[0]["prompt"] == CARD.prompts["query"]
    assert said["results"][0] == {
        "id": "1",
        "score": pytest.approx(1.0),
        "text": "red apples",
        "metadata": {"of": "1"},
    }
    assert len(said["results"]) == 2
    assert (said["method"], said["model"]) == ("cosine", CARD.name)
    assert "x-inference-time" in answer.headers


async def test_vector_is_searched_as_it_is_at_length_one():
    fleet = FakeFleet()
    twice = [2 * x for x in memoryview(vector("blue sky")).cast("f")]
    async with gateway_client(fleet) as client:
        await filled(client)
        answer = await client.post(SEARCH, json={"vector": twice, "threshold": 0.9999})
    assert answer.json()["results"][0]["id"] == "3"
    assert sum(x * x for x in fleet.calls[0]["query_vector"]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [1.0] * (DIMENSION - 1),
        [0.0] * DIMENSION,
        ["1"] * DIMENSION,
        [True] * DIMENSION,
        [None] * DIMENSION,
        [1e308] * DIMENSION,
        "abc",
        {"a": 1},
    ],
)
async def test_bad_vectors_are_named(bad):
    fleet = FakeFleet()
    async with gateway_client(fleet) as client:
        await filled(client)
        answer = await client.post(SEARCH, json={"vector": bad})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["code"], error["field"]) == ("invalid_vector", "vector")
    assert fleet.calls == []


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        ({}, "query"),
        ({"query": " "}, "query"),
        ({"query": "a", "vector": [1.0] * DIMENSION}, "vector"),
        ({"query": "a", "top_k": 0}, "top_k"),
        ({"query": "a", "top_k": 1001}, "top_k"),
        ({"query": "a", "top_k": 2.5}, "top_k"),
        ({"query": "a", "threshold": 2}, "threshold"),
        ({"query": "a", "exact": 1}, "exact"),
        ({"query": "a", "limit": 1}, "limit"),
        ({"query": "a", "rerank": "yes"}, "rerank"),
        ({"query": "a", "rerank": {"n": 1}}, "rerank.n"),
        ({"query": "a", "rerank": {"candidates": 5000}}, "candidates"),
        ({"vector": [1.0] * DIMENSION, "rerank": True}, "query"),
        ({"query": "a", "task_description": ""}, "task_description"),
    ],
)
async def test_bad_searches_name_their_field(sent, field):
    async with gateway_client(FakeFleet()) as client:
        await filled(client)
        answer = await client.post(SEARCH, json=sent)
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == field


async def test_rerank_orders_the_first_hits_and_says_how():
    fleet = FakeFleet()
    async with gateway_client(fleet) as client:
        await filled(client)
        answer = await client.post(
            SEARCH,
            json={"query": "blue sky", "top_k": 1, "rerank": {"candidates": 3, "top_n": 2}},
        )
    said = answer.json()
    assert said["rerank"] == {"model": CARD.name, "method": "cosine"}
    assert (said["results"][0]["id"], said["results"][0]["relevance_score"]) == ("3", 1.0)
    assert len(said["results"]) == 2
    assert [call["top_k"] for call in fleet.calls if "top_k" in call] == [3]


async def test_rerank_of_nothing_is_nothing():
    async with gateway_client(FakeFleet()) as client:
        await client.put("/collections/books")
        answer = await client.post(SEARCH, json={"query": "a", "rerank": True})
    assert answer.json()["results"] == []


async def test_articles_search_over_the_only_collection():
    async with gateway_client(FakeFleet()) as client:
        none = await client.post("/search", json={"query": "red apples"})
        await filled(client)
        said = (await client.post("/search", json={"query": "red apples", "top_k": 1})).json()
        bad = await client.post("/search", json={"query": "a", "score_treshold": 1})
    assert none.status_code == 404
    assert said["results"] == [
        {
            "doc_id": "1",
            "text": "red apples",
            "similarity_score": pytest.approx(1.0),
            "length": len("red apples"),
        }
    ]
    assert (said["query"], said["total_found"]) == ("red apples", 1)
    assert said["processing_time_ms"] > 0
    assert bad.json()["error"]["field"] == "score_treshold"


async def test_articles_search_reads_the_configured_collection():
    async with gateway_client(FakeFleet(), collection="books") as client:
        await filled(client)
        await client.put("/collections/more")
        answer = await client.post("/search", json={"query": "red apples"})
    assert answer.status_code == 200


async def test_model_with_other_weights_is_not_searched_with():
    fleet = FakeFleet()
    async with gateway_client(fleet) as client:
        await filled(client)
        changed = ModelCard(**{**fleet.cards[0].to_wire(), "tasks": ("embed",), "space": "f" * 16})
        old = fleet.cards[0]
        fleet.cards = [changed]
        refused = await client.post(SEARCH, json={"query": "a"})
        renamed = ModelCard(**{**old.to_wire(), "tasks": ("embed",), "name": "test/renamed"})
        fleet.cards = [changed, renamed]
        found = await client.post(SEARCH, json={"query": "red apples"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "space_mismatch")
    assert found.status_code == 200


def test_task_replaces_the_task_of_an_instruction_model_only():
    wire = {**CARD.to_wire(), "tasks": ("embed",)}
    qwen = ModelCard(**{**wire, "prompts": {"query": "Instruct: Search the web\nQuery:"}})
    assert qwen.query_prompt() == "Instruct: Search the web\nQuery:"
    assert qwen.query_prompt("Find laws") == "Instruct: Find laws\nQuery:"
    assert CARD.query_prompt("Find laws") == "query: "
    assert ModelCard(**{**wire, "prompts": {}}).query_prompt("Find laws") == ""


async def test_collections_are_made_listed_described_and_deleted():
    async with gateway_client(FakeFleet()) as client:
        made = await client.put("/collections/a", json={"policy": "exact", "recall_target": 1})
        again = await client.put("/collections/a", json={"policy": "exact", "recall_target": 1})
        other = await client.put("/collections/a", json={})
        listed = (await client.get("/collections")).json()
        read = (await client.get("/collections/a")).json()
        deleted = await client.delete("/collections/a")
        gone = await client.get("/collections/a")
    assert (made.status_code, again.json()) == (201, made.json())
    assert (other.status_code, other.json()["error"]["code"]) == (409, "collection_conflict")
    assert listed == {"collections": [made.json()]}
    assert read["stats"] == {"documents": 0, "segments": 1}
    assert deleted.json()["deleted"] is True
    assert gone.status_code == 404


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        ({"policy": "fast"}, "policy"),
        ({"versions": "none"}, "versions"),
        ({"recall_target": 2}, "recall_target"),
        ({"recall_target": "high"}, "recall_target"),
        ({"dimension": 3}, "dimension"),
        ({"model": ""}, "model"),
    ],
)
async def test_bad_collections_name_their_field(sent, field):
    async with gateway_client(FakeFleet()) as client:
        answer = await client.put("/collections/a", json=sent)
    assert answer.status_code == 400
    assert answer.json()["error"]["field"] == field


async def test_health_has_the_articles_fields():
    async with gateway_client(FakeFleet()) as client:
        await filled(client)
        answer = await client.get("/health")
    said = answer.json()
    assert answer.status_code == 200
    assert said["memory_usage"].pop("gateway_rss_bytes") > 0
    assert said == {
        "status": "healthy",
        "model_loaded": True,
        "index_available": True,
        "documents_indexed": 3,
        "gpu_count": 1,
        "workers_paused": 0,
        "memory_usage": {},
    }


async def test_health_is_a_503_without_workers_or_redis():
    fleet = FakeFleet()
    fleet.workers = ()
    async with gateway_client(fleet) as client:
        idle = await client.get("/health")

    async def away():
        raise RedisUnavailable

    fleet = FakeFleet()
    fleet.models = away
    async with gateway_client(fleet) as client:
        lost = await client.get("/health")
    assert (idle.status_code, idle.json()["reason"]) == (503, "no_worker")
    assert (lost.status_code, lost.json()["reason"]) == (503, "redis_unavailable")
    assert lost.json()["status"] == "unhealthy"


async def test_all_who_ask_for_health_share_one_look(monkeypatch):
    monkeypatch.setattr(health, "_KEPT_S", 600.0)
    monkeypatch.setattr(health, "_TIMEOUT_S", 60.0)
    looks = []
    go_on = asyncio.Event()

    class SlowFleet(FakeFleet):
        async def models(self):
            looks.append("models")
            await go_on.wait()
            return await super().models()

        async def collection_stats(self, collection):
            looks.append("stats")
            return await super().collection_stats(collection)

    async with gateway_client(SlowFleet()) as client:
        await filled(client)
        asking = [asyncio.create_task(client.get("/health")) for _ in range(50)]
        while not looks:
            await asyncio.sleep(0)
        asking[0].cancel()  # the one that began does not take the others along
        go_on.set()
        told = await asyncio.gather(*asking, return_exceptions=True)
        later = await client.get("/health")
    assert [answer.status_code for answer in told[1:]] == [200] * 49
    assert later.json() == told[1].json()
    assert looks == ["models", "stats"]


async def test_health_without_a_key_counts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(health, "_KEPT_S", 600.0)
    shown, entry = new_key()
    add_key(tmp_path / "keys.json", entry)
    asked = []

    class CountingFleet(FakeFleet):
        async def collection_stats(self, collection):
            asked.append(collection.name)
            return await super().collection_stats(collection)

        async def state(self):
            asked.append("state")
            return await super().state()

    async with gateway_client(CountingFleet(), keys_file=tmp_path / "keys.json") as client:
        key = {"x-api-key": shown}
        for name in ("a", "b", "c"):
            await client.put(f"/collections/{name}", headers=key)
        for _ in range(3):
            assert (await client.get("/health")).json()["index_available"] is True
        assert asked == ["a"]
        await client.get("/health", headers=key)
        assert sorted(asked) == ["a", "a", "b", "c", "state"]


async def test_metrics_tell_of_requests_queues_and_workers():
    fleet = FakeFleet()
    async with gateway_client(fleet) as client:
        await filled(client)
        await client.get("/collections/nope")
        text = (await client.get("/metrics")).text

        async def away():
            raise RedisUnavailable

        fleet.state = away
        without = await client.get("/metrics")
    for line in (
        'vecfleet_http_requests_total{method="GET",route="/collections/{collection}",'
        'status="404"} 1.0',
        'vecfleet_submitted_documents_total{outcome="accepted"} 3.0',
        "vecfleet_submissions_total 1.0",
        'vecfleet_queue_tokens{queue="vf.-.embed.0123456789abcdef.bulk"} 700.0',
        'vecfleet_queue_parked{queue="vf.-.embed.0123456789abcdef.bulk"} 4.0',
        'vecfleet_line_bytes{line="embed.0123456789abcdef.bulk"} 4096.0',
        'vecfleet_line_tenants{line="embed.0123456789abcdef.bulk"} 2.0',
        'vecfleet_model_workers{model="test/tiny"} 1.0',
        'vecfleet_model_tokens_per_second{model="test/tiny"} 1234.5',
        "vecfleet_redis_up 1.0",
    ):
        assert line in text.splitlines()
    assert without.status_code == 200
    assert "vecfleet_redis_up 0.0" in without.text


def test_a_vector_of_another_length_is_not_looked_through():
    with pytest.raises(InvalidVector, match="has 3 numbers"):
        parse_vector(["a", "b", "c"], 2)
