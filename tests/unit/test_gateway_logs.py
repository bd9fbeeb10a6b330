"""Log lines: one a request, with its id, and without anybody's text."""

import io
import json
import logging

import pytest
from gateway_fakes import FakeFleet, gateway_client

from vecfleet.common.logs import fields, request_id, setup_logging

CANARY = "canary-text-8731"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def restored_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


async def test_one_access_line_a_request_and_no_text_in_it(restored_logging):
    out = io.StringIO()
    setup_logging("info", out)
    fleet = FakeFleet()
    async with gateway_client(fleet) as client:
        await client.post("/v1/embeddings", json={"input": CANARY}, headers={"x-request-id": "r1"})
        await client.get(f"/{CANARY}")
        fleet.fail = ValueError(CANARY)
        await client.post("/v1/embeddings", json={"input": CANARY}, headers={"x-request-id": "r2"})
    assert CANARY not in out.getvalue()
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    lines = [line for line in lines if line["logger"].startswith("vecfleet")]
    access = [line for line in lines if line["message"] == "request"]
    assert [(a["route"], a["status"]) for a in access] == [
        ("/v1/embeddings", 200),
        ("unmatched", 404),
        ("/v1/embeddings", 500),
    ]
    assert access[0]["request_id"] == "r1"
    assert access[0]["ms"] > 0
    (failure,) = [line for line in lines if line["level"] == "error"]
    assert failure["request_id"] == "r2"
    assert failure["exception"].endswith("ValueError")
    assert "gateway" in failure["exception"]


def test_lines_for_people_and_for_machines(restored_logging):
    for out, check in (
        (Terminal(), lambda text: "rows=3" in text and "[abc]" in text),
        (io.StringIO(), lambda text: json.loads(text)["rows"] == 3),
    ):
        setup_logging("info", out)
        token = request_id.set("abc")
        logging.getLogger("x").info("closed %s", "it", extra=fields(rows=3))
        logging.getLogger("x").debug("not seen")
        request_id.reset(token)
        assert "closed it" in out.getvalue()
        assert check(out.getvalue())
        assert len(out.getvalue().splitlines()) == 1
