"""What the gateway's HTTP protocol does beyond uvicorn's, and how many connections it may have."""

import asyncio
import resource
import subprocess
import sys

import pytest
import uvicorn
import uvloop
from servers import eventually

from vecfleet.gateway.config import GatewayLimits
from vecfleet.gateway.protocol import _Outlet, protocol_class


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


MOST = 20
HEAD = b"GET / HTTP/1.1\r\nhost: localhost\r\n"


class Served:
    """An application whose requests wait until they are let go, behind the gateway's protocol."""

    def __init__(self, header_timeout_s=60):
        self.running = 0
        self.let_go = asyncio.Event()
        limits = GatewayLimits(
            max_connections=MOST, header_timeout_s=header_timeout_s, idle_timeout_s=60
        )
        config = uvicorn.Config(
            self.app,
            port=0,
            lifespan="off",
            interface="asgi3",
            http=protocol_class(limits),
            limit_concurrency=limits.max_connections,
            timeout_keep_alive=60,
            log_config=None,
        )
        self.server = uvicorn.Server(config)
        self.writers = []

    async def app(self, scope, receive, send):
        self.running += 1
        if scope["path"] == "/wait":
            await self.let_go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})
        self.running -= 1

    @property
    def connections(self):
        return len(self.server.server_state.connections)

    async def connect(self, sent=b""):
        port = self.server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        self.writers.append(writer)
        writer.write(sent)
        return reader, writer

    async def __aenter__(self):
        self.task = asyncio.create_task(self.server.serve())
        await eventually(lambda: self.server.started)
        return self

    async def __aexit__(self, *_):
        self.let_go.set()
        for writer in self.writers:
            writer.close()
        self.server.should_exit = True
        await self.task


async def status(reader):
    async with asyncio.timeout(30):
        return int((await reader.readline()).split()[1])


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


WAIT = b"GET /wait HTTP/1.1\r\nhost: localhost\r\n\r\n"


async def test_a_few_requests_of_one_connection_wait_for_the_first_and_are_answered_in_turn():
    async with Served() as served:
        reader, _ = await served.connect(WAIT + (HEAD + b"\r\n") * 16)
        await eventually(lambda: served.running == 1)
        served.let_go.set()
        async with asyncio.timeout(30):
            for _ in range(17):
                head = await reader.readuntil(b"\r\n\r\n")
                assert b"200 OK" in head
                assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"5\r\nhello")


async def test_more_of_them_are_refused_and_nothing_of_them_is_kept():
    async with Served() as served:
        reader, _ = await served.connect(WAIT + (HEAD + b"\r\n") * 40)
        await eventually(lambda: served.server.server_state.connections)
        (protocol,) = served.server.server_state.connections
        assert await status(reader) == 400
        async with asyncio.timeout(30):
            assert b"Too many requests wait" in await reader.read()
        assert len(protocol.pipeline) <= 16
        assert served.running == 1, "none of them began"
        served.let_go.set()
        await eventually(lambda: not served.connections)
        reader, _ = await served.connect(HEAD + b"\r\n")
        assert await status(reader) == 200


async def test_headers_without_end_are_cut_off_behind_a_request_too():
    async with Served() as served:
        _, writer = await served.connect(WAIT)
        await eventually(lambda: served.running == 1)
        writer.write(HEAD + b"x: " + b"a" * (8 << 20))
        await eventually(lambda: not served.connections)
        assert served.running == 1, "it did not take an answer"


async def test_half_a_request_may_wait_for_the_one_before_it():
    async with Served(header_timeout_s=0.05) as served:
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
