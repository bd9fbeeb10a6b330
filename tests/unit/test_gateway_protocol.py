"""What the gateway's HTTP protocol does beyond uvicorn's, and how many connections it may have."""

import asyncio
import resource
import subprocess
import sys

import pytest
import uvloop
from protocol_server import CHUNKED, HEAD, MOST, POST, WAIT, Served, status
from servers import eventually

from vecfleet.gateway.protocol import _Outlet


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_answer_to_a_closed_connection_goes_nowhere(make_loop):
    """uvloop's own transport raises then, and the request would count as failed."""

    async def scenario():
        closed = asyncio.Event()
        outlets = []

        class Server(asyncio.Protocol):
            def connection_made(self, transport):
                outlets.append(_Outlet(transport, linger_s=60))
                outlets[0].write(b"hello")

            def connection_lost(self, exc):
                closed.set()

        loop = asyncio.get_running_loop()
        server = await loop.create_server(Server, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        assert await reader.readexactly(5) == b"hello"
        outlets[0].close()
        await closed.wait()
        outlets[0].write(b"nobody reads this")
        assert outlets[0].is_closing()
        writer.close()
        server.close()

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(scenario())


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"\r\n"], ids=["none", "half", "answered"])
async def test_connections_without_a_request_do_not_keep_others_out(sent):
    async with Served() as served:
        held = [await served.connect(sent) for _ in range(3 * MOST)]
        await eventually(lambda: served.connections < MOST)
        for _ in range(3):
            reader, _ = await served.connect(HEAD + b"\r\n")
            assert await status(reader) == 200
        if sent == HEAD:
            async with asyncio.timeout(30):
                assert await held[0][0].read() == b"", "the oldest gave way"
            held[-1][1].write(b"\r\n")
            assert await status(held[-1][0]) == 200, "the youngest did not"


async def test_a_connection_with_a_request_never_gives_way():
    async with Served() as served:
        wait = b"GET /wait HTTP/1.1\r\nhost: localhost\r\n\r\n"
        first = [(await served.connect(wait))[0] for _ in range(MOST - 2)]
        await eventually(lambda: served.running == MOST - 2)
        for _ in range(3 * MOST):
            await served.connect(HEAD)
        await eventually(lambda: served.connections < MOST)
        reader, _ = await served.connect(HEAD + b"\r\n")
        assert await status(reader) == 200
        assert served.running == MOST - 2
        served.let_go.set()
        assert {await status(reader) for reader in first} == {200}


async def test_a_few_requests_of_one_connection_wait_for_the_first_and_are_answered_in_turn():
    async with Served() as served:
        reader, _ = await served.connect(WAIT + (HEAD + b"\r\n") * 16)
        await eventually(lambda: served.running == 1)
        served.let_go.set()
        async with asyncio.timeout(30):
            for _ in range(17):
                head = await reader.readuntil(b"\r\n\r\n")
                assert b"200 OK" in head
                assert await reader.readexactly(5) == b"hello"


async def test_a_body_behind_a_request_may_be_larger_than_headers():
    size = 300_000
    body = b"b" * (size - 1000)
    async with Served() as served:
        post = POST + b"content-length: %d\r\n\r\n" % size
        reader, writer = await served.connect(WAIT + post + b"b" * 1000)
        await eventually(lambda: served.running == 1)
        (protocol,) = served.server.server_state.connections
        await eventually(lambda: protocol.pipeline)
        served.let_go.set()
        await eventually(lambda: served.bodies)  # the answer before it is out
        for start in range(0, len(body), 10_000):
            writer.write(body[start : start + 10_000])
            await writer.drain()
        async with asyncio.timeout(30):
            for answer in (b"hello", b"%d" % size):
                assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
                assert await reader.readexactly(len(answer)) == answer


LETTER = POST.replace(b"/read", b"/") + b"content-length: 3\r\n\r\nabc"
UNREADABLE = {
    "too many": (LETTER * 40, 16, "Too many requests wait"),
    "endless headers": (HEAD + b"x: " + b"a" * 1_000_000, 0, "headers are too large"),
    "garbage": ((HEAD + b"\r\n") * 3 + b"\0\1\r\n\r\n", 3, "Invalid HTTP"),
    "address": (b"GET http:///x HTTP/1.1\r\nhost: localhost\r\n\r\n", 0, "Invalid HTTP"),
    "chunk": (HEAD + b"\r\n" + CHUNKED + b"3\r\nabc\r\nno number\r\n", 1, "Invalid HTTP"),
    "huge": (HEAD + b"\r\n" + CHUNKED + b"zz\r\n" + b"a" * 1_000_000, 1, "Invalid HTTP"),
}


@pytest.mark.parametrize("path", [b"/wait", b"/half"])
@pytest.mark.parametrize(("sent", "good", "message"), UNREADABLE.values(), ids=UNREADABLE)
async def test_what_cannot_be_read_is_refused_behind_the_answers_to_what_could(
    path, sent, good, message
):
    async with Served() as served:
        reader, writer = await served.connect(WAIT.replace(b"/wait", path))
        await eventually(lambda: served.running == 1)
        (protocol,) = served.server.server_state.connections
        original, received = protocol.data_received, []

        def data_received(data):
            received.append(len(data))
            original(data)

        protocol.data_received = data_received
        writer.write(sent)
        await eventually(lambda: sum(received) == len(sent))
        assert served.begun == [path.decode()], "none of the others began"
        assert len(protocol.pipeline) == good
        assert {bytes(cycle.body) for cycle, _ in protocol.pipeline} <= {b"", b"abc"}
        assert protocol._header_bytes < 500_000, "nothing behind a refusal is parsed"
        assert not served.bodies
        served.let_go.set()
        async with asyncio.timeout(30):
            for _ in range(1 + good):
                assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
                assert await reader.readexactly(5) == b"hello"
            refusal = await reader.read()
        assert refusal.startswith(b"HTTP/1.1 400 ") and refusal.count(b"HTTP/1.1") == 1
        assert message.encode() in refusal
        assert not served.bodies
        await eventually(lambda: not served.connections)
        reader, _ = await served.connect(HEAD + b"\r\n")
        assert await status(reader) == 200


async def test_a_broken_body_is_refused_at_once_where_nothing_is_answered_before():
    async with Served() as served:
        reader, writer = await served.connect(CHUNKED + b"3\r\nabc\r\n")
        await eventually(lambda: served.bodies)
        writer.write(b"no number\r\n")
        assert await status(reader) == 400


async def test_an_answer_that_has_begun_is_ended_before_its_own_broken_body_is_refused():
    async with Served() as served:
        reader, writer = await served.connect(CHUNKED.replace(b"/read", b"/half"))
        async with asyncio.timeout(30):
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(2) == b"he"
            (protocol,) = served.server.server_state.connections
            writer.write(b"no number\r\n")
            await eventually(lambda: protocol._refusal)
            served.let_go.set()
            assert (await reader.read()).startswith(b"lloHTTP/1.1 400 ")


async def test_who_sends_without_end_behind_a_refusal_is_cut_off():
    async with Served() as served:
        _, writer = await served.connect(WAIT)
        await eventually(lambda: served.running == 1)
        writer.write(b"\0\1\r\n\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(64):
                writer.write(bytes(1 << 20))
                await writer.drain()
        await eventually(lambda: not served.connections)
        assert served.running == 1


async def test_a_connection_ends_with_an_answer_that_came_before_the_body():
    """The rest of the body would be waited for without any bound."""
    async with Served() as served:
        late = POST.replace(b"/read", b"/") + b"content-length: 9\r\n\r\n"
        reader, _ = await served.connect(late)
        async with asyncio.timeout(30):
            assert (await reader.read()).endswith(b"hello")
        await eventually(lambda: not served.connections)


async def test_half_a_request_may_wait_for_the_one_before_it():
    async with Served() as served:
        reader, writer = await served.connect(WAIT)
        await eventually(lambda: served.running == 1)
        (protocol,) = served.server.server_state.connections
        writer.write(HEAD)
        await eventually(lambda: protocol._header_bytes == len(HEAD))
        assert protocol._header_timer is None, "its time has not begun"
        served.let_go.set()
        assert await status(reader) == 200


ALLOW = """
import logging, resource, sys
from vecfleet.gateway.main import _allow_connections
logging.basicConfig(format="%(message)s")
soft, hard, wanted = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(_allow_connections(wanted), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "allowed", "then"),
    [(256, 2000, 1000, 1256), (256, 800, 544, 800), (1500, 1500, 1000, 1500)],
)
def test_as_many_files_as_connections_need_are_asked_for(soft, hard, allowed, then):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2000:
        pytest.skip("this process may not open enough files itself")
    limits = [str(number) for number in (soft, hard, 1000)]
    run = [sys.executable, "-c", ALLOW, *limits]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(allowed), str(then)]
    assert ("ulimit -n" in done.stderr) == (allowed < 1000)
