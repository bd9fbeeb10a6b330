"""What many tenants have in the dead letter together, on each Redis."""

from __future__ import annotations

import itertools
from random import Random

import pytest

from vecfleet.common import keys
from vecfleet.common.admission import Admission
from vecfleet.common.dead_letter import DeadFilter, DeadLetter
from vecfleet.common.errors import EngineFailed, QueueFull
from vecfleet.common.queue_client import NewJob, QueueClient, Route
from vecfleet.common.room import Room
from vecfleet.worker.job import Failure, Settlement
from vecfleet.worker.ledger import Ask, Ledger

MOST_BYTES = 1_000_000
ENTRY_BYTES = 5000  # as it is counted: its data and 2,200
TENANTS = 30
BOUNDS = Admission(max_dead_bytes=MOST_BYTES)
MERGE = keys.merge_queue("c0ffee" * 5 + "00")


class Tenants:
    """Tenants whose documents all end in the dead letter."""

    def __init__(self, client, asynchronous) -> None:
        self.queues, self.letter = QueueClient(asynchronous, BOUNDS), DeadLetter(asynchronous)
        self.room = Room(asynchronous, BOUNDS, itertools.count().__next__)  # it looks each time
        self.ledger = Ledger(client, "w")
        self.held = [0] * TENANTS
        self.rng = Random(3)
        self._ids = itertools.count()

    async def _bury_one(self, tenant: int) -> bool:
        """One document more; False where it was refused."""
        queue = keys.embed_queue("5pace", "bulk", f"t{tenant}")
        glance, _, _ = await self.room.verdict(queue, MERGE, 1)
        number = next(self._ids)
        job = NewJob(f"j{number}", b"x" * (ENTRY_BYTES - 2200), 1, number, 1)
        try:
            await self.queues.enqueue(queue, [job], Route(submission=f"s{tenant}"))
        except QueueFull as error:
            assert "dead letter" in error.message
            assert glance == b"dead_full"
            return False
        assert glance == b"ok"
        claimed = self.ledger.claim([Ask(queue, 1, 99)])
        self.ledger.settle([Settlement(job, Failure(EngineFailed("no"))) for job in claimed])
        self.held[tenant] += ENTRY_BYTES
        return True

    async def fill(self, *tenants: int) -> None:
        """Bury documents of each in turn until all are refused."""
        left = list(tenants)
        while left := [tenant for tenant in left if await self._bury_one(tenant)]:
            self.rng.shuffle(left)

    async def clear(self, tenant: int) -> None:
        cursor = ""
        while True:
            sweep = await self.letter.each("drop", DeadFilter(tenant=f"t{tenant}"), cursor=cursor)
            assert not sweep.failed
            if not (cursor := sweep.cursor):
                break
        self.held[tenant] = 0


@pytest.mark.parametrize("order", ["one after the other", "in turn", "coming and going"])
async def test_dead_letters_of_many_tenants_stay_within_their_limit(client, asynchronous, order):
    tenants = Tenants(client, asynchronous)
    if order == "one after the other":
        for place in range(TENANTS):
            await tenants.fill(place)
            of = place + 1
            assert tenants.held[place] >= 3 * MOST_BYTES / (4 * of * (of + 1))
    else:
        await tenants.fill(*range(TENANTS))
    if order == "coming and going":
        for _ in range(4):
            for place in tenants.rng.sample(range(TENANTS), 10):
                await tenants.clear(place)
            await tenants.fill(*tenants.rng.sample(range(TENANTS), TENANTS))
    assert int(client.hget(keys.DEAD_BYTES, "*")) == sum(tenants.held)
    assert sum(tenants.held) <= MOST_BYTES + TENANTS * ENTRY_BYTES
    assert all(tenants.held)


@pytest.mark.parametrize("seed", range(8))
def test_no_order_of_tenants_passes_the_limit(seed):
    rng, held, step = Random(seed), [0] * 12, 500
    for _ in range(1000):
        tenant = rng.randrange(len(held))
        if rng.random() < 0.3:
            held[tenant] = 0
        for _ in range(rng.choice((0, 1, 9, 2000))):
            there = sum(size > 0 for size in held)
            if held[tenant] and held[tenant] > BOUNDS.dead_share_bytes(sum(held), there):
                break
            held[tenant] += step
        assert sum(held) <= MOST_BYTES + len(held) * step
