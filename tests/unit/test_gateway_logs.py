"""Log lines: one a request, with its id, and without anybody's text."""

import asyncio
import gc
import io
import json
import logging
import sys
import threading

import pytest
import redis
import uvloop
from gateway_fakes import FakeFleet, gateway_client

from vecfleet.common.errors import RedisUnavailable, VecfleetError
from vecfleet.common.logs import fields, request_id, setup_logging
from vecfleet.common.redis_client import translated

CANARY = "canary-text-8731"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def restored_logging():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    hooks = threading.excepthook, sys.excepthook, sys.unraisablehook
    yield
    threading.excepthook, sys.excepthook, sys.unraisablehook = hooks
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


class Quoting:
    def __del__(self):
        raise ValueError(CANARY)


def fail(text):
    raise ValueError(f"cannot read {text}")


async def fail_later(text):
    result = asyncio.get_running_loop().create_future()
    result.set_result(text)
    fail(await result)


def fail_in_a_task():
    async def scenario():
        task = asyncio.create_task(fail_later(CANARY))
        await asyncio.wait([task])
        del task
        gc.collect()

    return scenario


def fail_in_a_callback():
    async def scenario():
        asyncio.get_running_loop().call_soon(fail, CANARY)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    return scenario


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("scenario", [fail_in_a_task(), fail_in_a_callback()])
def test_what_nobody_caught_in_a_loop_is_told_without_its_text(
    restored_logging, make_loop, scenario
):
    out = io.StringIO()
    setup_logging("info", out)
    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(scenario())
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    (line,) = [line for line in lines if line["level"] == "error"]
    assert line["exception"].endswith("ValueError")
    assert "fail" in line["exception"]
    assert CANARY not in out.getvalue()


def in_a_thread():
    thread = threading.Thread(target=fail, args=(CANARY,))
    thread.start()
    thread.join()


def in_a_finalizer():
    Quoting()
    gc.collect()


def in_the_main_program():
    try:
        fail(CANARY)
    except ValueError as error:
        sys.excepthook(type(error), error, error.__traceback__)  # as the interpreter does


@pytest.mark.parametrize("place", [in_a_thread, in_a_finalizer, in_the_main_program])
def test_what_nobody_caught_elsewhere_is_told_without_its_text(restored_logging, capfd, place):
    out = io.StringIO()
    setup_logging("info", out)
    place()
    (line,) = [json.loads(line) for line in out.getvalue().splitlines()]
    assert line["exception"].endswith("ValueError")
    captured = capfd.readouterr()
    assert CANARY not in out.getvalue() + captured.out + captured.err


@pytest.mark.parametrize(
    "error",
    [
        redis.exceptions.ResponseError(
            f"Command # 1 (ZADD secret-key {CANARY} a) of pipeline caused error: ERR secret-words"
        ),
        redis.exceptions.ConnectionError("Error 111 connecting to secret-host:6379."),
        redis.exceptions.NoPermissionError("User secret-user has no permissions"),
        redis.exceptions.AuthenticationError("WRONGPASS for secret-user"),
        redis.exceptions.ResponseError("READONLY secret-words"),
        redis.exceptions.InvalidResponse("secret-words"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_redis_says_is_for_the_log_alone(restored_logging, error):
    out = io.StringIO()
    setup_logging("info", out)
    fleet = FakeFleet()
    with pytest.raises(VecfleetError) as caught, translated():
        raise error
    fleet.fail = caught.value
    async with gateway_client(fleet) as client:
        answer = await client.post("/v1/embeddings", json={"input": "a"})
        assert answer.status_code == (503 if isinstance(caught.value, RedisUnavailable) else 500)
    assert "secret" not in answer.text
    (line,) = [line for line in out.getvalue().splitlines() if "secret" in line]
    assert CANARY not in line
