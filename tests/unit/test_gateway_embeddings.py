"""POST /v1/embeddings and POST /embed: shapes in, shapes out, and what is refused."""

import base64
import json
import struct

import pytest
from gateway_fakes import FakeFleet, gateway_client
from gateway_responder import CARD, DIMENSION, vector

from vecfleet.common.errors import EngineFailed, QueueFull, TextsTooLong
from vecfleet.gateway.config import GatewayLimits


def body(**more):
    return {"input": "good morning", "model": CARD.name, **more}


async def test_floats_read_back_as_the_same_float32():
    async with gateway_client(FakeFleet()) as client:
        answer = (await client.post("/v1/embeddings", json=body(input=["a b", "c"]))).json()
    assert answer["object"] == "list"
    assert answer["model"] == CARD.name
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert [(row["object"], row["index"]) for row in answer["data"]] == [
        ("embedding", 0),
        ("embedding", 1),
    ]
    for row, text in zip(answer["data"], ["a b", "c"], strict=True):
        assert struct.pack(f"<{DIMENSION}f", *row["embedding"]) == vector(text)


async def test_base64_is_the_raw_little_endian_vector():
    async with gateway_client(FakeFleet()) as client:
        answer = (await client.post("/v1/embeddings", json=body(encoding_format="base64"))).json()
    assert base64.b64decode(answer["data"][0]["embedding"]) == vector("good morning")


async def test_bytes_are_the_body_and_metadata_is_a_header():
    async with gateway_client(FakeFleet()) as client:
        answer = await client.post(
            "/v1/embeddings", json=body(input=["a", "b"], encoding_format="bytes")
        )
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.content == vector("a") + vector("b")
    metadata = json.loads(answer.headers["metadata"])
    assert metadata["shape"] == [2, DIMENSION]
    assert metadata["usage"]["total_tokens"] == 2


async def test_timing_headers_tell_what_the_job_told():
    async with gateway_client(FakeFleet()) as client:
        headers = (await client.post("/v1/embeddings", json=body())).headers
    assert float(headers["x-queue-time"]) == 1.5
    assert float(headers["x-inference-time"]) == 2.5
    assert headers["x-compute-tokens"] == "2"
    assert float(headers["x-total-time"]) > 0
    assert "x-truncated" not in headers


async def test_model_may_be_left_out_and_extras_are_passed_on():
    fleet = FakeFleet()
    async with gateway_client(fleet) as client:
        answer = await client.post(
            "/v1/embeddings",
            json={
                "input": "x",
                "user": "someone",
                "prompt_name": "query",
                "truncate": False,
                "dimensions": DIMENSION,
            },
        )
    assert answer.status_code == 200
    assert fleet.calls == [
        {"texts": ["x"], "prompt_name": "query", "truncate": False, "dimensions": DIMENSION}
    ]


@pytest.mark.parametrize(
    ("more", "field", "code"),
    [
        ({"input": [1, 2, 3]}, "input", "invalid_input"),
        ({"input": [[1, 2], [3]]}, "input", "invalid_input"),
        ({"input": []}, "input", "invalid_input"),
        ({"input": ""}, "input", "empty_text"),
        ({"input": ["a", " \n"]}, "input[1]", "empty_text"),
        ({"input": ["a", 7]}, "input[1]", "invalid_input"),
        ({"input": None}, "input", "invalid_input"),
        ({"input": {"a": 1}}, "input", "invalid_input"),
        ({"input": ["x"] * 2049}, "input", "too_many_items"),
        ({"input": "x" * (300 << 10)}, "input", "text_too_long"),
        ({"input": ["x" * 200_000] * 7}, "input", "too_many_items"),
        ({"dimensions": DIMENSION - 1}, "dimensions", "invalid_input"),
        ({"dimensions": True}, "dimensions", "invalid_input"),
        ({"encoding_format": "hex"}, "encoding_format", "invalid_input"),
        ({"encoding_format": ["float"]}, "encoding_format", "invalid_input"),
        ({"model": 5}, "model", "invalid_input"),
        ({"user": {}}, "user", "invalid_input"),
        ({"prompt_name": "nope"}, "prompt_name", "invalid_input"),
        ({"truncate": "yes"}, "truncate", "invalid_input"),
        ({"inputs": "x"}, "inputs", "unknown_field"),
    ],
)
async def test_bad_requests_name_their_field_in_openais_shape(more, field, code):
    fleet = FakeFleet()
    async with gateway_client(fleet) as client:
        answer = await client.post("/v1/embeddings", json=body(**more))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (field, code, "invalid_request_error")
    assert error["message"]
    assert error["request_id"] == answer.headers["x-request-id"]
    assert fleet.calls == []


async def test_unknown_model_is_openais_404():
    async with gateway_client(FakeFleet()) as client:
        answer = await client.post("/v1/embeddings", json=body(model="other"))
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


async def test_no_worker_is_a_503_that_says_when_to_try_again():
    fleet = FakeFleet()
    fleet.workers = ()
    async with gateway_client(fleet) as client:
        answer = await client.post("/v1/embeddings", json=body())
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert answer.json()["error"]["type"] == "server_error"


async def test_full_queue_is_a_429_that_says_when_to_try_again():
    fleet = FakeFleet()
    fleet.fail = QueueFull(retry_after_s=7.2)
    async with gateway_client(fleet) as client:
        answer = await client.post("/v1/embeddings", json=body())
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "8"
    assert answer.json()["error"]["type"] == "rate_limit_error"


async def test_unforeseen_error_is_a_500_without_details(caplog):
    fleet = FakeFleet()
    fleet.fail = ValueError("secret text in a message")
    async with gateway_client(fleet) as client:
        answer = await client.post("/v1/embeddings", json=body())
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]


async def test_tei_answers_a_bare_list():
    fleet = FakeFleet()
    async with gateway_client(fleet) as client:
        answer = await client.post(
            "/embed",
            json={"inputs": ["a", "b"], "normalize": True, "truncation_direction": "Right"},
        )
    assert [struct.pack(f"<{DIMENSION}f", *row) for row in answer.json()] == [
        vector("a"),
        vector("b"),
    ]
    assert fleet.calls[0]["truncate"] is False
    assert "x-inference-time" in answer.headers


@pytest.mark.parametrize(
    ("sent", "status", "kind"),
    [
        ({"inputs": ""}, 400, "Empty"),
        ({"inputs": [1]}, 422, "Validation"),
        ({"inputs": "a", "normalize": False}, 422, "Validation"),
        ({"inputs": "a", "truncation_direction": "Left"}, 422, "Validation"),
        ({"inputs": "a", "dimensions": 3}, 422, "Validation"),
        ({"inputs": "a", "prompt_name": "nope"}, 422, "Validation"),
        ({"inputs": "a", "colour": "red"}, 422, "Validation"),
    ],
)
async def test_tei_errors_have_teis_shape(sent, status, kind):
    async with gateway_client(FakeFleet()) as client:
        answer = await client.post("/embed", json=sent)
    assert answer.status_code == status
    assert answer.json()["error_type"] == kind
    assert isinstance(answer.json()["error"], str)


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (QueueFull(), 429, "Overloaded"),
        (EngineFailed(), 424, "Backend"),
        (TextsTooLong(indices=(0,)), 422, "Validation"),
    ],
)
async def test_tei_statuses_are_teis_own(error, status, kind):
    fleet = FakeFleet()
    fleet.fail = error
    async with gateway_client(fleet) as client:
        answer = await client.post("/embed", json={"inputs": "a"})
    assert (answer.status_code, answer.json()["error_type"]) == (status, kind)


@pytest.mark.parametrize(("path", "field"), [("/v1/embeddings", "input"), ("/embed", "inputs")])
async def test_a_text_that_is_too_long_is_named(path, field):
    fleet = FakeFleet()
    fleet.fail = TextsTooLong(indices=(7, 9))
    async with gateway_client(fleet) as client:
        among = (await client.post(path, json={field: ["a"] * 10, "truncate": False})).json()
        fleet.fail = TextsTooLong(indices=(0,))
        alone = (await client.post(path, json={field: "a", "truncate": False})).json()
    if path == "/embed":
        assert among["error"].startswith("inputs[7] and 1 more are longer")
        assert alone["error"].startswith("inputs is longer")
    else:
        assert among["error"]["param"] == "input[7]"
        assert among["error"]["message"].startswith("input[7] and 1 more are longer")
        assert alone["error"]["param"] == "input"


async def test_limits_come_from_the_config():
    async with gateway_client(FakeFleet(), GatewayLimits(max_inputs=2)) as client:
        answer = await client.post("/v1/embeddings", json=body(input=["a", "b", "c"]))
    assert answer.json()["error"]["code"] == "too_many_items"


async def test_models_are_listed_and_read_by_names_with_slashes():
    async with gateway_client(FakeFleet()) as client:
        listed = (await client.get("/v1/models")).json()
        one = (await client.get(f"/v1/models/{CARD.name}")).json()
        missing = await client.get("/v1/models/none/such")
    assert listed["object"] == "list"
    assert listed["data"] == [one]
    assert (one["id"], one["object"], one["dimension"]) == (CARD.name, "model", DIMENSION)
    assert (one["quantization"], one["pooling"]) == ("none", CARD.pooling)
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
