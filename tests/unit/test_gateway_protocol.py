"""What the gateway's HTTP protocol does beyond uvicorn's."""

import asyncio

import pytest
import uvloop

from vecfleet.gateway.protocol import _Outlet


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_answer_to_a_closed_connection_goes_nowhere(make_loop):
    """uvloop's own transport raises then, and the request would count as failed."""

    async def scenario():
        closed = asyncio.Event()
        outlets = []

        class Server(asyncio.Protocol):
            def connection_made(self, transport):
                outlets.append(_Outlet(transport))
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
