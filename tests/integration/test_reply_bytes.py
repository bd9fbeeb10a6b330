"""What a client does not read is bounded, in bytes too, and the client is told."""

from __future__ import annotations

import pytest

from vecfleet.common import codec, keys
from vecfleet.common.errors import Unavailable, from_wire
from vecfleet.common.queue_client import NewJob, QueueClient, Route
from vecfleet.common.redis_client import connect, connect_async
from vecfleet.worker import ledger as ledger_module
from vecfleet.worker.job import Answer, Settlement
from vecfleet.worker.ledger import Ask, Ledger

QUEUE = keys.embed_queue("5pace", "interactive")
MOST = 1 << 20
LARGE = MOST // 10


@pytest.fixture
def client(redis_server_factory, each_redis_binary, monkeypatch):
    """A Redis, and scripts whose boxes take 1 MiB."""
    original = ledger_module.read_lua

    def read(folder, *names):
        script = original(folder, *names)
        assert "MOST_REPLY_BYTES = 2 ^ 28" in script
        return script.replace("MOST_REPLY_BYTES = 2 ^ 28", f"MOST_REPLY_BYTES = {MOST}")

    monkeypatch.setattr(ledger_module, "read_lua", read)
    server = redis_server_factory(binary=each_redis_binary, append_only=False)
    with connect(server.url) as connection:
        connection.url = server.url
        connection.set(keys.alive("box"), 1)
        yield connection


async def settle(client, count, size, first=0):
    """So many jobs whose answers for ``box`` have so many bytes each."""
    async with connect_async(client.url) as connection:
        jobs = [NewJob(f"j{n}", codec.pack_call("f", 1), 1) for n in range(first, first + count)]
        await QueueClient(connection).enqueue(QUEUE, jobs, Route(box="box"))
    ledger = Ledger(client, "w")
    claimed = ledger.claim([Ask(QUEUE, count, count)])
    assert len(claimed) == count
    for job in claimed:
        assert ledger.settle([Settlement(job, Answer({"a": bytes(size)}))]) == [True]


def waiting(client):
    """The size of each answer in the box, 0 for an error."""
    found = []
    for raw in client.lrange(keys.reply("box"), 0, -1):
        _, status, body = codec.loads(raw)
        if status == "error":
            assert isinstance(from_wire(body), Unavailable)
            assert "too slowly" in body["message"]
        found.append(len(body["a"]) if status == "ok" else 0)
    return found


async def test_a_box_that_nobody_reads_takes_so_many_bytes(client):
    await settle(client, 30, LARGE)
    found = waiting(client)
    assert len(found) == 30  # each is told of
    assert found[:10] == [LARGE] * 10  # the first one came into an empty box, and is not counted
    assert found[11:] == [0] * 19
    assert client.ttl("vf:reply_size:box") > 0


async def test_what_was_read_makes_room_again(client):
    await settle(client, 30, LARGE)
    client.lpop(keys.reply("box"), 28)
    await settle(client, 5, LARGE, first=30)
    assert waiting(client)[2:] == [LARGE] * 5


async def test_a_client_that_reads_gets_all_of_it(client):
    for n in range(100):
        await settle(client, 2, LARGE, first=2 * n)
        assert waiting(client) == [LARGE, LARGE]
        client.delete(keys.reply("box"))


async def test_small_answers_that_are_read_hide_no_large_ones(client):
    await settle(client, 300, 10)
    await settle(client, 20, LARGE, first=300)
    client.lpop(keys.reply("box"), 299)
    await settle(client, 20, LARGE, first=400)
    assert sum(waiting(client)) <= 2 * MOST


@pytest.mark.parametrize("key", [keys.reply("box"), "vf:reply_size:box"])
async def test_a_box_that_is_something_else_holds_nobody_up(client, key):
    client.rpush(keys.reply("box"), b"")
    client.delete(key)
    client.set(key, "x")
    await settle(client, 2, 10)
