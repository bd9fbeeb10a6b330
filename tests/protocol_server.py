"""An application behind the gateway's protocol, whose requests wait until they are let go."""

from __future__ import annotations

import asyncio

import uvicorn
from servers import eventually

from vecfleet.gateway.config import GatewayLimits
from vecfleet.gateway.protocol import protocol_class

MOST = 20
HEAD = b"GET / HTTP/1.1\r\nhost: localhost\r\n"
WAIT = b"GET /wait HTTP/1.1\r\nhost: localhost\r\n\r\n"
POST = b"POST /read HTTP/1.1\r\nhost: localhost\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"


class Served:
    """An application whose requests wait until they are let go, behind the gateway's protocol."""

    def __init__(self):
        self.running = 0
        self.begun = []
        self.bodies = []
        self.gone = self.answered = 0
        self.let_go = asyncio.Event()
        limits = GatewayLimits(
            max_connections=MOST,
            header_timeout_s=60,
            idle_timeout_s=60,
            unread_silence_s=600,
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
        self.begun.append(scope["path"])
        answer = b"hello"
        while scope["path"] == "/read":
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            self.bodies.append(message["body"])
            if not message["more_body"]:
                answer = b"%d" % sum(map(len, self.bodies))
                break
        if scope["path"] == "/wait":
            await self.let_go.wait()
        if scope["path"] == "/watch":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone += 1
        if scope["path"] == "/large":
            answer = bytes(16 << 20)
        length = str(len(answer)).encode()
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-length", length)],
            }
        )
        if scope["path"] == "/half":
            await send({"type": "http.response.body", "body": answer[:2], "more_body": True})
            await self.let_go.wait()
            answer = answer[2:]
        await send({"type": "http.response.body", "body": answer})
        self.running -= 1
        self.answered += 1

    @property
    def connections(self):
        return len(self.server.server_state.connections)

    def protocol_of(self, client):
        """What serves the connection from this address, where it is counted."""
        mine = [each for each in self.server.server_state.connections if each.client == client]
        return mine[0] if mine else None

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
