"""Calls to Redis can be cancelled, and time out, wherever they are."""

import asyncio
import socket

import pytest
import uvloop

from vecfleet.common.errors import RedisUnavailable
from vecfleet.common.redis_client import connect_async, translated


async def test_a_cancellation_is_kept_at_every_step_of_a_call(redis_url):
    async with connect_async(redis_url) as client:
        await client.ping()

        async def talk() -> None:
            while True:
                pipe = client.pipeline(transaction=False)
                pipe.hget("some", "state")
                await pipe.execute()

        for turns in range(400):
            task = asyncio.create_task(talk())
            for _ in range(turns % 40):
                await asyncio.sleep(0)
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=20)
            assert done, f"goes on after a cancellation {turns % 40} turns after its start"


async def test_a_server_that_takes_nothing_is_told(monkeypatch):
    monkeypatch.setattr("vecfleet.common.redis_client.SOCKET_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never reads
        async with connect_async(f"redis://127.0.0.1:{server.getsockname()[1]}") as client:
            async with asyncio.timeout(20):
                with pytest.raises(RedisUnavailable), translated():
                    await client.set("large", bytes(64 << 20))


async def test_a_connection_that_does_not_close_in_time_is_no_failure(redis_url, monkeypatch):
    monkeypatch.setattr("vecfleet.common.redis_client.CONNECT_TIMEOUT_S", 0.3)
    async with connect_async(redis_url) as client:
        await client.ping()
        (connection,) = client.connection_pool._available_connections

        async def never() -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(connection._writer, "wait_closed", never)
    assert not connection.is_connected


def test_a_connection_that_was_cut_before_a_write_is_told_as_such(redis_url):
    """uvloop, which runs the gateway, has a RuntimeError for it."""

    async def write_after_the_cut() -> None:
        async with connect_async(redis_url) as client:
            connection = await client.connection_pool.get_connection()
            connection._writer.transport.abort()
            with pytest.raises(RedisUnavailable), translated():
                await connection.send_command("PING")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(write_after_the_cut())
