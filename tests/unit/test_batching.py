"""The packing rule alone: budgets, order, shares and starvation."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vecfleet.worker.batching import Batch, Batcher, Entry, packed_cost, padded_cost, rounded
from vecfleet.worker.engine import Priority

INTERACTIVE, BULK = Priority.INTERACTIVE, Priority.BULK
STEP = 1024


def entries(call, lengths):
    return [Entry(call, place, length, None) for place, length in enumerate(lengths)]


def drain(batcher) -> list[Batch]:
    batches = []
    while (batch := batcher.next_batch()) is not None:
        batches.append(batch)
    return batches


def passage_lengths(count, seed=0):
    rng = random.Random(seed)
    return [min(256, max(8, int(rng.lognormvariate(4.0, 0.8)))) for _ in range(count)]


@settings(max_examples=150, deadline=None)
@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from([INTERACTIVE, BULK]),
            st.lists(st.integers(1, 600), min_size=1, max_size=40),
        ),
        max_size=12,
    ),
    cost=st.sampled_from([packed_cost, padded_cost]),
    pauses=st.lists(st.integers(0, 3), max_size=12),
)
def test_every_entry_comes_once_and_no_batch_passes_the_budget(calls, cost, pauses):
    batcher = Batcher(STEP, cost)
    batches = []
    for number, (priority, lengths) in enumerate(calls):
        batcher.add(priority, entries(number, lengths))
        for _ in range(pauses[number] if number < len(pauses) else 0):
            if (batch := batcher.next_batch()) is not None:
                batches.append(batch)
    batches += drain(batcher)
    came = Counter((e.call, e.place) for batch in batches for e in batch.entries)
    assert came == Counter(
        (number, place)
        for number, (_, lengths) in enumerate(calls)
        for place in range(len(lengths))
    )
    for batch in batches:
        lengths = [entry.length for entry in batch.entries]
        assert lengths == sorted(lengths)
        assert batch.tokens == sum(lengths)
        assert len(lengths) == 1 or cost(len(lengths), sum(lengths), lengths[-1]) <= STEP
        assert all(calls[entry.call][0] is batch.priority for entry in batch.entries)
    assert batcher.pending_tokens == 0


def test_interactive_passes_bulk_that_waits():
    batcher = Batcher(STEP)
    batcher.add(BULK, entries("bulk", [100] * 100))
    first = batcher.next_batch()
    batcher.add(INTERACTIVE, entries("query", [12]))
    second = batcher.next_batch()
    third = batcher.next_batch()
    assert [first.priority, second.priority, third.priority] == [BULK, INTERACTIVE, BULK]


def test_bulk_keeps_a_tenth_of_the_tokens():
    batcher = Batcher(STEP)
    batcher.add(BULK, entries("bulk", [100] * 10_000))
    tokens = Counter()
    for number in range(400):
        while batcher.pending_tokens < 1_050_000:
            batcher.add(INTERACTIVE, entries(number, [64] * 64))
        batch = batcher.next_batch()
        tokens[batch.priority] += batch.tokens
    share = tokens[BULK] / sum(tokens.values())
    assert 0.09 < share < 0.12


def test_credit_is_not_kept_while_no_bulk_waits():
    batcher = Batcher(STEP)
    for number in range(100):
        batcher.add(INTERACTIVE, entries(number, [512]))
    drain(batcher)
    batcher.add(BULK, entries("bulk", [100] * 100))
    batcher.add(INTERACTIVE, entries("query", [12]))
    assert batcher.next_batch().priority is INTERACTIVE


def test_a_small_interactive_call_passes_a_large_one():
    batcher = Batcher(STEP)
    batcher.add(INTERACTIVE, entries("large", [200] * 100))
    batcher.next_batch()
    batcher.add(INTERACTIVE, entries("small", [12]))
    assert "small" in {entry.call for entry in batcher.next_batch().entries}


def test_a_large_interactive_call_is_not_starved_by_small_ones():
    batcher = Batcher(STEP)
    batcher.add(INTERACTIVE, entries("large", [200] * 50))
    left = 50
    for number in range(200):
        for twin in range(40):
            batcher.add(INTERACTIVE, entries((number, twin), [25]))
        left -= sum(entry.call == "large" for entry in batcher.next_batch().entries)
        if not left:
            return
    pytest.fail(f"{left} texts of the large call still wait")


def test_dropping_a_call_forgets_its_waiting_texts_only():
    batcher = Batcher(STEP)
    batcher.add(BULK, entries("gone", [100] * 50))
    batcher.add(BULK, entries("kept", [100] * 50))
    batcher.add(INTERACTIVE, entries("gone", [10] * 3))
    batcher.add(INTERACTIVE, entries("kept", [10] * 3))
    assert batcher.drop("gone") == 5030
    assert batcher.pending_tokens == 5030
    came = Counter(entry.call for batch in drain(batcher) for entry in batch.entries)
    assert came == Counter({"kept": 53})
    assert batcher.drop("kept") == 0


def steady(batcher, blocks, in_flight):
    """Run ``blocks`` of 256 with ``in_flight`` of them waiting, as a worker that refills does."""
    left = Counter()
    waiting = iter(enumerate(blocks))
    batches, idle = [], 0

    def refill():
        while len(left) < in_flight and (block := next(waiting, None)) is not None:
            number, lengths = block
            left[number] = len(lengths)
            batcher.add(BULK, entries(number, lengths))

    refill()
    while (batch := batcher.next_batch()) is not None:
        batches.append(batch)
        for entry in batch.entries:
            left[entry.call] -= 1
        for number in [number for number, count in left.items() if not count]:
            del left[number]
        idle += not batcher.pending_tokens and len(batches) * STEP < sum(map(sum, blocks))
        refill()
    return batches, idle


@pytest.mark.parametrize("cost", [packed_cost, padded_cost])
def test_blocks_that_keep_coming_cost_hardly_more_than_all_at_once(cost):
    blocks = [passage_lengths(256, seed) for seed in range(16)]
    at_once = Batcher(STEP, cost)
    at_once.add(BULK, entries("all", [length for block in blocks for length in block]))
    batches, idle = steady(Batcher(STEP, cost), blocks, in_flight=4)

    def computed(batches):
        return sum(
            cost(len(b.entries), b.tokens, b.entries[-1].length)
            + (STEP // 16)  # what a step costs beside its tokens
            for b in batches
        )

    assert computed(batches) <= 1.03 * computed(drain(at_once))
    assert idle == 0  # there was always a block left to go on with


def test_a_waiting_block_is_done_before_many_later_ones():
    batcher = Batcher(STEP)
    blocks = [passage_lengths(256, seed) for seed in range(24)]
    batches, _ = steady(batcher, blocks, in_flight=4)
    last_seen = {e.call: place for place, batch in enumerate(batches) for e in batch.entries}
    done_order = sorted(last_seen, key=last_seen.get)
    assert all(abs(place - number) <= 4 for place, number in enumerate(done_order))


def test_rounding():
    assert [rounded(length) for length in (1, 16, 17, 256)] == [16, 16, 32, 256]
