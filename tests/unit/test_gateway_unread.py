"""Clients that do not read their answers: what they hold is bounded, and ends."""

import asyncio
import json
import socket
import ssl
import time

import pytest
import uvicorn
import uvloop
from certificates import Authority
from gateway_fakes import FakeFleet
from servers import eventually

from vecfleet.common.document import Block, Document
from vecfleet.gateway.app import create_app
from vecfleet.gateway.config import GatewayConfig, GatewayLimits
from vecfleet.gateway.protocol import _Outlet, protocol_class

TEXT = "x" * (250 << 10)
DOCUMENTS = 20  # an answer of 5 MB
SHARED = 24 << 20


class Gateway:
    """A gateway over a fleet in memory, with sockets whose buffers are small."""

    def __init__(self, silence_s=60.0, **tls):
        self.fleet = FakeFleet()
        for n in range(DOCUMENTS):
            block = Block()
            block.add(Document(f"d{n}", TEXT))
            self.fleet.blocks.append(("s", n, block))
        limits = GatewayLimits(max_unread_bytes=SHARED, unread_silence_s=silence_s)
        config = uvicorn.Config(
            create_app(self.fleet, GatewayConfig("unused", limits=limits)),
            http=protocol_class(limits),
            lifespan="off",
            log_config=None,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=1,
            **tls,
        )
        self.server = uvicorn.Server(config)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.sockets = []

    async def __aenter__(self):
        self.task = asyncio.create_task(self.server.serve([self.listener]))
        await eventually(lambda: self.server.started)
        await self.fleet.create_collection("books", tenant="-")
        return self

    async def __aexit__(self, *_):
        for one in self.sockets:
            one.close()
        self.server.should_exit = True
        await self.task
        self.listener.close()

    @property
    def connections(self):
        return len(self.server.server_state.connections)

    def searches(self):
        return sum("query_vector" in call for call in self.fleet.calls)

    async def leave_unread(self, headers="", tls=None):
        """Ask for a large answer, and read nothing of it."""
        searches = self.searches()
        one = await asyncio.to_thread(self._send, request(DOCUMENTS, headers), tls)
        self.sockets.append(one)
        await eventually(lambda: self.searches() > searches)

    def _send(self, sent, tls):
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(self.listener.getsockname())
        if tls is not None:
            one = tls.wrap_socket(one, server_hostname="localhost")
        one.sendall(sent)
        return one

    async def ask(self, top_k=DOCUMENTS):
        """The status of a search whose answer is read, and its results."""
        reader, writer = await asyncio.open_connection(*self.listener.getsockname())
        writer.write(request(top_k, "connection: close\r\n"))
        async with asyncio.timeout(30):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return int(head.split()[1]), json.loads(body)


def request(top_k, headers=""):
    body = json.dumps({"query": "x", "top_k": top_k}).encode()
    head = f"POST /collections/books/search HTTP/1.1\r\nhost: localhost\r\n{headers}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def test_answers_that_are_not_read_are_bounded_and_small_ones_go_on():
    async with Gateway() as gateway:
        held = 0
        while (answer := await gateway.ask())[0] == 200:
            await gateway.leave_unread()
            held += 1
            assert held < 10
        searches = gateway.searches()
        assert answer[0] == 503
        assert "not been read" in answer[1]["error"]["message"]
        assert (await gateway.ask())[0] == 503
        assert gateway.searches() == searches, "it was asked for all the same"
        assert held == 2  # half of what there is: one tenant's share
        assert (await gateway.ask(top_k=1))[0] == 200


async def test_who_reads_nothing_is_cut_off_and_makes_room_again():
    async with Gateway(silence_s=6.0) as gateway:
        await gateway.leave_unread()
        await gateway.leave_unread("connection: close\r\n")
        await eventually(lambda: gateway.connections == 0, what="the end of who reads nothing")
        status, answer = await gateway.ask()
        assert status == 200
        assert len(answer["results"]) == DOCUMENTS


async def test_so_it_is_over_tls(tmp_path):
    authority = Authority(tmp_path)
    own = authority.issue("localhost", "DNS:localhost")
    client = ssl.create_default_context(cafile=str(authority.cert))
    async with Gateway(0.5, ssl_certfile=own.cert, ssl_keyfile=own.key) as gateway:
        await gateway.leave_unread(tls=client)
        await eventually(lambda: gateway.connections == 0, what="the end of who reads nothing")


async def test_who_reads_slowly_gets_all_of_it():
    async with Gateway(silence_s=8.0) as gateway:
        await gateway.leave_unread("connection: close\r\n")
        (one,) = gateway.sockets

        def read():
            parts = []
            while part := one.recv(1 << 18):
                parts.append(part)
                time.sleep(0.008)  # between two looks of a slow client: 10 s in all
            return b"".join(parts)

        body = (await asyncio.to_thread(read)).partition(b"\r\n\r\n")[2]
        assert len(json.loads(body)["results"]) == DOCUMENTS


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_closed_connection_keeps_what_is_unread_for_a_while_only(make_loop):
    async def scenario():
        lost = asyncio.Event()
        outlets = []

        class Server(asyncio.Protocol):
            def connection_made(self, transport):
                outlets.append(_Outlet(transport, linger_s=0.1))
                outlets[0].write(bytes(16 << 20))
                outlets[0].close()

            def connection_lost(self, exc):
                lost.set()

        server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
        with socket.create_connection(server.sockets[0].getsockname()):
            await eventually(lost.is_set)
        server.close()

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(scenario())
