"""Where requests on one connection begin and end, and what of them the gateway holds meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from protocol_server import CHUNKED, HEAD, MOST, POST, WAIT, Served, status
from servers import eventually

UPGRADE = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
SECOND = b"GET /second HTTP/1.1\r\nhost: localhost\r\n\r\n"


async def sent_until_cut_off(writer, block):
    """How many bytes were taken; 64 MiB at most."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 64 << 20:
            writer.write(block)
            await writer.drain()
            sent += len(block)
    return sent


# Behind a body


@pytest.mark.parametrize("path", [b"/read", b"/wait"])
@pytest.mark.parametrize("block", [b"x: %s\r\n" % (b"a" * 1000) * 100, b"a" * 100_000])
@pytest.mark.parametrize("behind", [b"0\r\n", b"0\r\nx: ", b"3;x="])
async def test_what_comes_with_and_behind_a_chunked_body_is_bounded_as_headers_are(
    path, block, behind
):
    async with Served() as served:
        start = CHUNKED.replace(b"/read", path) + b"3\r\nabc\r\n" + behind
        _, writer = await served.connect(start)
        await eventually(lambda: served.running == 1)
        (protocol,) = served.server.server_state.connections
        assert await sent_until_cut_off(writer, block) < 32 << 20
        await eventually(lambda: not served.connections)
        assert sum(len(value) for _, value in protocol.headers) < 1 << 20


async def test_trailers_are_read_over_and_the_next_request_is_read():
    async with Served() as served:
        sent = CHUNKED + b"3\r\nabc\r\n0\r\nx: y\r\n\r\n" + SECOND
        reader, _ = await served.connect(sent)
        async with asyncio.timeout(30):
            for answer in (b"3", b"hello"):
                assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
                assert await reader.readexactly(len(answer)) == answer
        assert served.begun == ["/read", "/second"]


# Another protocol is asked for, as Java's client does by default


BODY = b"GET /smuggled HTTP/1.1\r\nhost: localhost\r\n\r\n"
FRAMED = {
    "length": (b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY), len(BODY)),
    "chunked": (
        b"transfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
        len(BODY),
    ),
    "empty": (b"content-length: 0\r\n\r\n", 0),
    "none": (b"\r\n", 0),
}


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize(("framed", "size"), FRAMED.values(), ids=FRAMED)
async def test_a_request_for_another_protocol_is_served_in_this_one_with_its_body(
    framed, size, piece
):
    async with Served() as served:
        sent = (POST + UPGRADE + framed) * 2 + SECOND
        reader, writer = await served.connect()
        for at in range(0, len(sent), piece):
            writer.write(sent[at : at + piece])
            await asyncio.sleep(0)
        async with asyncio.timeout(30):
            for answer in (b"%d" % size, b"%d" % (2 * size), b"hello"):
                assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
                assert await reader.readexactly(len(answer)) == answer
        assert served.begun == ["/read", "/read", "/second"]
        assert b"".join(served.bodies) == BODY * (2 if size else 0)


BROKEN = {
    "chunk": b"transfer-encoding: chunked\r\n\r\nno number\r\n",
    "encoding": b"transfer-encoding: gzip\r\n\r\nabc",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
async def test_a_broken_body_of_such_a_request_is_refused(broken):
    async with Served() as served:
        reader, _ = await served.connect(POST + UPGRADE + broken)
        assert await status(reader) == 400
        await eventually(lambda: not served.connections)


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
async def test_and_what_came_before_it_is_answered(broken):
    async with Served() as served:
        reader, _ = await served.connect(WAIT + POST + UPGRADE + broken)
        await eventually(lambda: served.running == 1)
        await asyncio.sleep(0.05)
        served.let_go.set()
        async with asyncio.timeout(30):
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(5) == b"hello"
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")


async def test_behind_a_refusal_such_requests_are_not_read():
    async with Served() as served:
        _, writer = await served.connect(WAIT)
        await eventually(lambda: served.running == 1)
        (protocol,) = served.server.server_state.connections
        parsers = set()
        original = protocol._parse
        protocol._parse = lambda data: (original(data), parsers.add(protocol.parser))
        writer.write((POST + UPGRADE + b"content-length: 0\r\n\r\n") * 400)
        await eventually(lambda: protocol._refusal)
        assert len(protocol.pipeline) == 16
        assert protocol.parser in parsers


# What waits


async def test_the_body_of_a_request_that_waits_is_left_with_its_client():
    async with Served() as served:
        large = POST + b"content-length: 90000000\r\n\r\n"
        _, writer = await served.connect(WAIT + HEAD + b"\r\n" + large)
        await eventually(lambda: served.running == 1)
        (protocol,) = served.server.server_state.connections
        pump = asyncio.create_task(sent_until_cut_off(writer, b"b" * 100_000))
        held = 0
        while held <= 65536:  # more than what may be read ahead
            protocol.flow.resume_reading()  # as the request that is at work does
            await asyncio.sleep(0.01)
            held = len(protocol.cycle.body) if len(protocol.pipeline) == 2 else 0
        for _ in range(10):
            protocol.flow.resume_reading()
            await asyncio.sleep(0.01)
        assert len(protocol.cycle.body) == held
        served.let_go.set()
        await eventually(lambda: sum(map(len, served.bodies)) > 1 << 20)
        pump.cancel()
        await asyncio.wait([pump])


@pytest.mark.parametrize("behind", [b"", SECOND, b"\0\1\r\n\r\n"])
async def test_the_request_at_work_is_told_that_its_client_has_gone(behind):
    """Whatever its client has sent behind it."""
    async with Served() as served:
        _, writer = await served.connect(CHUNKED + b"3\r\nabc\r\n0\r\n\r\n")
        await eventually(lambda: served.begun)
        _, writer = await served.connect(WAIT.replace(b"/wait", b"/watch") + behind)
        await eventually(lambda: "/watch" in served.begun)
        await asyncio.sleep(0.05)
        writer.transport.abort()
        await eventually(lambda: served.gone == 1)


async def test_who_still_reads_an_answer_gives_way_to_nobody_while_others_have_nothing_to_do():
    async with Served() as served:
        reader, _ = await served.connect(WAIT.replace(b"/wait", b"/large"))
        await eventually(lambda: served.answered == 1)
        for _ in range(2 * MOST):
            other, _ = await served.connect(SECOND)
            assert await status(other) == 200
        async with asyncio.timeout(30):
            assert len(await reader.readuntil(b"\r\n\r\n")) > 0
            assert len(await reader.readexactly(16 << 20)) == 16 << 20


async def test_who_does_not_read_its_answers_holds_no_place_of_anothers():
    """Such a connection would be counted no more, and stay open for ``unread_silence_s``."""
    async with Served() as served:
        loop, clients = asyncio.get_running_loop(), []
        protocols = set()
        for _ in range(2 * MOST):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            port = served.server.servers[0].sockets[0].getsockname()[1]
            await loop.sock_connect(client, ("127.0.0.1", port))
            clients.append(client)
            mine = client.getsockname()
            protocol = await eventually(lambda mine=mine: served.protocol_of(mine))
            protocols.add(protocol)
            answered = served.answered
            await loop.sock_sendall(client, WAIT.replace(b"/wait", b"/large"))
            await eventually(lambda answered=answered: served.answered > answered)
            assert protocol.transport.get_write_buffer_size()
        await eventually(lambda: sum(each.parser is not None for each in protocols) <= MOST)
        for client in clients:
            client.close()
