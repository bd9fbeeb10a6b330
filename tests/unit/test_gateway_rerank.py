"""Reranking in the shapes of Cohere v1 with Jina, Cohere v2, TEI and the articles."""

import math

import pytest
from gateway_fakes import FakeFleet, gateway_client
from gateway_responder import CARD

from vecfleet.common.errors import TextsTooLong

QUERY = "red green"
TEXTS = ["blue", "green red", "red"]  # scores 0, 1 and 0.5


async def test_v1_answers_the_union_of_cohere_and_jina():
    async with gateway_client(FakeFleet()) as client:
        answer = (
            await client.post(
                "/v1/rerank",
                json={
                    "model": CARD.name,
                    "query": QUERY,
                    "documents": ["blue", {"text": "green red"}, "red"],
                    "top_n": 2,
                    "return_documents": True,
                    "rank_fields": ["text"],
                },
            )
        ).json()
    assert answer["results"] == [
        {"index": 1, "relevance_score": 1.0, "document": {"text": "green red"}},
        {"index": 2, "relevance_score": 0.5, "document": {"text": "red"}},
    ]
    assert answer["model"] == CARD.name
    assert answer["usage"] == {"total_tokens": 4, "prompt_tokens": 4}
    assert answer["meta"]["api_version"]["version"] == "1"
    assert answer["id"]


async def test_v1_leaves_documents_out_unless_asked():
    async with gateway_client(FakeFleet()) as client:
        answer = await client.post("/v1/rerank", json={"query": QUERY, "documents": TEXTS})
    assert answer.json()["results"][0] == {"index": 1, "relevance_score": 1.0}


async def test_v2_has_no_documents_and_counts_search_units():
    async with gateway_client(FakeFleet()) as client:
        answer = (
            await client.post(
                "/v2/rerank",
                json={
                    "model": CARD.name,
                    "query": QUERY,
                    "documents": TEXTS * 40,
                    "top_n": 1,
                    "priority": 5,
                    "max_tokens_per_doc": 4096,
                },
            )
        ).json()
    assert answer["results"] == [{"index": 1, "relevance_score": 1.0}]
    assert answer["meta"] == {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": 2},
    }


async def test_tei_answers_a_bare_sorted_list():
    async with gateway_client(FakeFleet()) as client:
        answer = await client.post(
            "/rerank", json={"query": QUERY, "texts": TEXTS, "return_text": True}
        )
    assert answer.json() == [
        {"index": 1, "score": 1.0, "text": "green red"},
        {"index": 2, "score": 0.5, "text": "red"},
        {"index": 0, "score": 0.0, "text": "blue"},
    ]


async def test_tei_raw_scores_are_logits_and_finite():
    async with gateway_client(FakeFleet()) as client:
        answer = await client.post(
            "/rerank", json={"query": QUERY, "texts": TEXTS, "raw_scores": True}
        )
    scores = {row["index"]: row["score"] for row in answer.json()}
    assert scores[2] == pytest.approx(0.0)
    assert scores[1] == pytest.approx(-scores[0], rel=1e-6)
    assert math.isfinite(scores[1])
    assert scores[1] > 10


async def test_articles_shape_ranks_and_drops_the_unsure():
    fleet = FakeFleet()
    async with gateway_client(fleet) as client:
        answer = (
            await client.post(
                "/rerank", json={"query": QUERY, "documents": TEXTS, "instruction": "Find colours"}
            )
        ).json()
    assert answer["ranked_documents"] == [
        {"document": "green red", "relevance_score": 1.0, "confidence": 1.0, "rank": 1},
        {"document": "blue", "relevance_score": 0.0, "confidence": 1.0, "rank": 2},
    ]
    assert answer["total_processed"] == 3
    assert answer["processing_time_ms"] > 0
    assert fleet.calls[0]["instruction"] == "Find colours"


@pytest.mark.parametrize(
    ("path", "sent", "field"),
    [
        ("/v1/rerank", {"query": QUERY, "documents": []}, "documents"),
        ("/v1/rerank", {"query": QUERY, "documents": "one"}, "documents"),
        ("/v1/rerank", {"query": QUERY, "documents": [{"title": "x"}]}, "documents[0].title"),
        ("/v1/rerank", {"query": QUERY, "documents": ["a", {"text": 3}]}, "documents[1]"),
        ("/v1/rerank", {"query": "", "documents": TEXTS}, "query"),
        ("/v1/rerank", {"documents": TEXTS}, "query"),
        ("/v1/rerank", {"query": QUERY, "documents": TEXTS, "top_n": 0}, "top_n"),
        ("/v1/rerank", {"query": QUERY, "documents": TEXTS, "rank_fields": ["x"]}, "rank_fields"),
        ("/v1/rerank", {"query": QUERY, "documents": TEXTS, "top_k": 3}, "top_k"),
        (
            "/v1/rerank",
            {"query": QUERY, "documents": TEXTS, "max_tokens_per_doc": 5},
            "max_tokens_per_doc",
        ),
        ("/v1/rerank", {"query": QUERY, "documents": ["a"] * 1001}, "documents"),
        ("/v1/rerank", {"query": "q" * 100_000, "documents": ["a"] * 100}, "documents"),
    ],
)
async def test_bad_requests_name_their_field(path, sent, field):
    fleet = FakeFleet()
    async with gateway_client(fleet) as client:
        answer = await client.post(path, json=sent)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert fleet.calls == []


async def test_v2_errors_have_the_plain_shape_and_rerank_has_teis():
    async with gateway_client(FakeFleet()) as client:
        v2 = await client.post("/v2/rerank", json={"query": QUERY, "documents": [{"text": "x"}]})
        tei = await client.post("/rerank", json={"query": QUERY, "texts": [""]})
        neither = await client.post("/rerank", json={"query": QUERY})
    assert v2.status_code == 400
    assert v2.json()["error"]["field"] == "documents[0]"
    assert (tei.status_code, tei.json()["error_type"]) == (400, "Empty")
    assert (neither.status_code, neither.json()["error_type"]) == (422, "Validation")


@pytest.mark.parametrize(
    ("path", "given", "off", "field"),
    [
        ("/v1/rerank", "documents", "truncation", "documents[1]"),
        ("/rerank", "texts", "truncate", "texts[1]"),
    ],
)
async def test_a_document_that_is_too_long_is_named(path, given, off, field):
    fleet = FakeFleet()
    fleet.fail = TextsTooLong(indices=(1,))
    async with gateway_client(fleet) as client:
        sent = {"query": QUERY, given: TEXTS, off: False}
        said = (await client.post(path, json=sent)).json()["error"]
        fleet.fail = TextsTooLong("the query is too long", indices=(0, 1), field="query")
        query = (await client.post(path, json=sent)).json()["error"]
    if path == "/rerank":
        assert said.startswith(f"{field} is longer")
        assert query == "the query is too long"
    else:
        assert (said["param"], query["param"]) == (field, "query")


async def test_an_instruction_counts_once_a_document():
    fleet = FakeFleet()
    body = {"query": QUERY, "documents": ["a"] * 1000, "instruction": "word " * 300}
    async with gateway_client(fleet) as client:
        answer = await client.post("/v1/rerank", json=body)
        assert answer.json()["error"]["code"] == "too_many_items"
        assert fleet.calls == []
        fewer = {**body, "documents": ["a"] * 500}
        assert (await client.post("/v1/rerank", json=fewer)).status_code == 200


async def test_too_many_documents_are_not_looked_at_one_by_one():
    sent = {"query": "a", "documents": [{"no_text": "a"}] * 1001}
    async with gateway_client(FakeFleet()) as client:
        answer = await client.post("/v1/rerank", json=sent)
    assert answer.json()["error"]["code"] == "too_many_items"
