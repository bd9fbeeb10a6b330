"""Whose queues a claim asks first."""

from __future__ import annotations

from collections import Counter

import pytest

from vecfleet.common import keys
from vecfleet.worker.queue_turns import QueueTurns


def queue(tenant: str, collection: str = "c") -> keys.QueueName:
    return keys.merge_queue(collection, tenant)


def firsts(names: list[keys.QueueName], busy: set[keys.QueueName], claims: int = 300) -> Counter:
    """How often each got the only job of a claim, where ``busy`` always have something waiting."""
    turns, got = QueueTurns(), Counter()
    for _ in range(claims):
        first = next(name for name in turns.order(names) if name in busy)
        turns.served([first], names)
        got[first] += 1
    return got


def test_each_order_has_every_queue_once():
    names = [queue("a", "1"), queue("b", "2"), queue("a", "3")]
    turns = QueueTurns()
    for name in names * 5:
        assert Counter(turns.order(names)) == Counter(names)
        turns.served([name], names)


@pytest.mark.parametrize("idle", [0, 1, 8, 100])
def test_who_has_nothing_waiting_gives_its_neighbour_no_larger_share(idle):
    busy = {queue("one"), queue("other")}
    names = [queue("one"), *(queue(f"idle{n}") for n in range(idle)), queue("other")]
    assert firsts(names, busy) == {queue("one"): 150, queue("other"): 150}


def test_many_collections_win_a_tenant_no_larger_share():
    names = [queue("large", str(n)) for n in range(50)] + [queue("small")]
    got = firsts(names, set(names))
    assert got[queue("small")] == 150
    assert {got[name] for name in names[:-1]} == {3}


def test_the_other_tenant_comes_before_the_second_queue_of_the_same():
    names = [queue("large", str(n)) for n in range(50)] + [queue("small")]
    turns = QueueTurns()
    assert {name.tenant for name in turns.order(names)[:2]} == {"large", "small"}
    turns.served([names[0], names[1]], names)
    assert turns.order(names)[0] == queue("small")


def test_the_queues_that_one_name_stands_for_have_their_turns_too():
    catalog, merge = keys.catalog_queue(tenant=keys.EVERY_TENANT), queue("one")
    turns = QueueTurns()
    assert turns.order([catalog, merge])[0] == catalog
    turns.served([keys.catalog_queue(tenant="somebody")], [catalog, merge])
    assert turns.order([catalog, merge])[0] == merge
    turns.served([merge], [catalog, merge])
    assert turns.order([catalog, merge])[0] == catalog


def test_queues_that_are_gone_are_forgotten():
    turns = QueueTurns()
    for n in range(1000):
        names = [queue(f"tenant{n}"), queue("stays")]
        turns.order(names)
        turns.served(names, names)
    assert len(turns._queues) <= 6
    assert len(turns._tenants) <= 6


def test_no_queues():
    assert QueueTurns().order([]) == []
