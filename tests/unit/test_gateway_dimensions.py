"""Shorter vectors, prompts, instructions over HTTP: passed on, or refused before the queue."""

import struct
from dataclasses import replace

import pytest
from gateway_fakes import FakeFleet, gateway_client
from gateway_responder import CARD, DIMENSION, vector

from vecfleet.gateway.config import GatewayLimits

SEARCH = "/collections/books/search"
QUERY = "Instruct: Search the web\nQuery:"
TRAINED = replace(CARD, matryoshka=True, matryoshka_dimensions=(2, 4), prompts={"query": QUERY})


async def post(path, body, card=TRAINED, **settings):
    fleet = FakeFleet(card)
    async with gateway_client(fleet, **settings) as client:
        return await client.post(path, json=body), fleet.calls


async def test_openai_dimensions_cut_the_vectors():
    answer, calls = await post("/v1/embeddings", {"input": "x", "dimensions": 4})
    assert answer.status_code == 200
    assert struct.pack("<4f", *answer.json()["data"][0]["embedding"]) == vector("x", 4)
    assert calls[0]["dimensions"] == 4


async def test_tei_dimensions_cut_the_vectors():
    answer, calls = await post("/embed", {"inputs": ["x"], "dimensions": 2})
    assert [len(row) for row in answer.json()] == [2]
    assert calls[0]["dimensions"] == 2


@pytest.mark.parametrize(("path", "field"), [("/v1/embeddings", "input"), ("/embed", "inputs")])
async def test_prompts_and_instructions_are_passed_on(path, field):
    _, named = await post(path, {field: "x", "prompt_name": "query"})
    assert named[0]["prompt_name"] == "query"
    _, told = await post(path, {field: "x", "instruction": "Find laws"})
    assert told[0]["instruction"] == "Find laws"


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"dimensions": 3}, "dimensions"),
        ({"dimensions": DIMENSION + 1}, "dimensions"),
        ({"dimensions": "4"}, "dimensions"),
        ({"prompt_name": "nope"}, "prompt_name"),
        ({"instruction": " "}, "instruction"),
        ({"instruction": 5}, "instruction"),
        ({"prompt_name": "query", "instruction": "Find laws"}, "instruction"),
    ],
)
async def test_what_the_model_does_not_take_is_never_queued(more, field):
    answer, calls = await post("/v1/embeddings", {"input": "x", **more})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert calls == []
    answer, calls = await post("/embed", {"inputs": "x", **more})
    assert 400 <= answer.status_code <= 422
    assert calls == []


async def test_a_refusal_says_what_is_allowed():
    answer, _ = await post("/v1/embeddings", {"input": "x", "dimensions": 3})
    assert "one of 2, 4, 8" in answer.json()["error"]["message"]
    answer, _ = await post("/v1/embeddings", {"input": "x", "dimensions": 4}, CARD)
    assert "not trained for shorter vectors" in answer.json()["error"]["message"]
    answer, _ = await post("/v1/embeddings", {"input": "x", "instruction": "Find laws"}, CARD)
    assert "takes no instruction" in answer.json()["error"]["message"]


async def test_an_instruction_counts_once_a_text():
    limits = GatewayLimits(max_request_tokens=1000)
    body = {"input": ["x"] * 50, "instruction": "word " * 30}
    answer, calls = await post("/v1/embeddings", body, limits=limits)
    assert answer.json()["error"]["code"] == "too_many_items"
    assert calls == []
    answer, _ = await post("/v1/embeddings", {**body, "input": ["x"] * 5}, limits=limits)
    assert answer.status_code == 200


async def test_a_model_says_what_it_takes():
    async with gateway_client(FakeFleet(TRAINED)) as client:
        one = (await client.get(f"/v1/models/{CARD.name}")).json()
    assert (one["matryoshka"], one["matryoshka_dimensions"]) == (True, [2, 4])
    assert (one["prompts"], one["takes_instruction"]) == (["query"], True)
    async with gateway_client(FakeFleet()) as client:
        one = (await client.get(f"/v1/models/{CARD.name}")).json()
    assert (one["matryoshka"], one["takes_instruction"]) == (False, False)


async def test_a_collection_pins_its_dimensions():
    fleet = FakeFleet(TRAINED)
    async with gateway_client(fleet) as client:
        refused = await client.put("/collections/books", json={"dimensions": 3})
        made = await client.put("/collections/books", json={"dimensions": 4})
        again = await client.put("/collections/books", json={"dimensions": 4})
        other = await client.put("/collections/books", json={})
        whole = await client.put("/collections/whole", json={})
        the_same = await client.put("/collections/whole", json={"dimensions": DIMENSION})
        rows = [{"id": "1", "text": "red apples"}, {"id": "2", "text": "blue sky"}]
        await client.post("/collections/books/documents", json={"documents": rows})
        raw = list(memoryview(vector("blue sky", 4)).cast("f"))
        by_vector = await client.post(SEARCH, json={"vector": raw})
        by_query = await client.post(SEARCH, json={"query": "red apples"})
        too_long = await client.post(SEARCH, json={"vector": [1.0] * DIMENSION})
    assert (refused.status_code, refused.json()["error"]["field"]) == (400, "dimensions")
    assert (made.status_code, made.json()["dimension"]) == (201, 4)
    assert again.json() == made.json()
    assert other.json()["error"]["code"] == "collection_conflict"
    assert the_same.json() == whole.json()
    assert by_vector.json()["results"][0]["id"] == "2"
    assert by_query.status_code == 200
    assert [call["dimensions"] for call in fleet.calls if "dimensions" in call] == [4]
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "invalid_vector")


async def test_a_searchs_instruction_replaces_the_task():
    fleet = FakeFleet(TRAINED)
    async with gateway_client(fleet) as client:
        await client.put("/collections/books")
        await client.post(SEARCH, json={"query": "a"})
        await client.post(SEARCH, json={"query": "a", "instruction": "Find laws"})
        await client.post(SEARCH, json={"query": "a", "task_description": "Find laws"})
        fleet.cards = [CARD]
        await client.post(SEARCH, json={"query": "a", "task_description": "Find laws"})
    prompts = [call["prompt"] for call in fleet.calls if "prompt" in call]
    told = "Instruct: Find laws\nQuery:"
    assert prompts == [QUERY, told, told, CARD.prompts["query"]]


@pytest.mark.parametrize(
    ("card", "sent"),
    [
        (CARD, {"query": "a", "instruction": "Find laws"}),
        (TRAINED, {"query": "a", "instruction": "a", "task_description": "b"}),
        (TRAINED, {"query": "a", "instruction": " "}),
        (TRAINED, {"vector": [1.0] * DIMENSION, "instruction": "a"}),
    ],
)
async def test_an_instruction_that_cannot_be_followed_is_refused(card, sent):
    async with gateway_client(FakeFleet(card)) as client:
        await client.put("/collections/books")
        answer = await client.post(SEARCH, json=sent)
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, "instruction")
