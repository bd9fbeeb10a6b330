"""Whose queues a claim asks first."""

from __future__ import annotations

from collections import Counter

from vecfleet.common import keys
from vecfleet.worker.claimer import by_turns


def queue(tenant: str, collection: str = "c") -> keys.QueueName:
    return keys.merge_queue(collection, tenant)


def test_each_turn_asks_every_queue_once():
    names = [queue("a", "1"), queue("b", "2"), queue("a", "3")]
    for turn in range(20):
        assert Counter(by_turns(names, turn)) == Counter(names)


def test_many_collections_win_a_tenant_no_larger_share():
    names = [queue("large", str(n)) for n in range(50)] + [queue("small")]
    first = Counter(by_turns(names, turn)[0].tenant for turn in range(100))
    assert first == {"large": 50, "small": 50}


def test_the_other_tenant_comes_before_the_second_of_the_same():
    names = [queue("large", str(n)) for n in range(50)] + [queue("small")]
    assert {name.tenant for name in by_turns(names, 0)[:2]} == {"large", "small"}


def test_each_of_a_tenants_queues_gets_its_turn():
    names = [queue("large", str(n)) for n in range(5)] + [queue("small")]
    first = Counter(by_turns(names, turn)[0] for turn in range(10))
    assert set(first.values()) == {1, 5}
    assert set(first) == set(names)


def test_no_queues():
    assert by_turns([], 7) == []
