"""A real Redis of each version, looked at from outside and through the product's clients."""

from __future__ import annotations

import pytest

from vecfleet.common.queue_client import QueueClient
from vecfleet.common.redis_client import connect, connect_async


@pytest.fixture
def client(redis_server_factory, each_redis_binary):
    """A client of a Redis of this test's own; ``client.url`` says where it is."""
    server = redis_server_factory(binary=each_redis_binary, append_only=False)
    with connect(server.url) as connection:
        connection.url = server.url
        yield connection


@pytest.fixture
async def asynchronous(client):
    """The same Redis, for the event loop."""
    async with connect_async(client.url) as connection:
        yield connection


@pytest.fixture
def queues(asynchronous):
    """Its queues, with the usual limits."""
    return QueueClient(asynchronous)
