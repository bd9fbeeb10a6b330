"""Credits bound what is in flight, and never starve a long block."""

from __future__ import annotations

import threading

import pytest

from vecfleet.worker.window import MAX_BYTES, Room, Window, interactive_tokens


def test_room_shrinks_with_what_is_taken_and_comes_back():
    window = Window(max_tokens=100, max_jobs=3)
    assert window.room() == Room(3, 100, MAX_BYTES)
    window.take(60)
    assert window.room() == Room(2, 40, MAX_BYTES)
    window.take(60)
    assert window.room() is None
    window.give_back(60)
    assert window.room() == Room(2, 40, MAX_BYTES)
    assert window.in_flight == (1, 60)


def test_jobs_are_bounded_too():
    window = Window(max_tokens=100, max_jobs=1)
    window.take(1)
    assert window.room() is None


def test_two_blocks_always_fit_however_long_their_texts():
    window = Window(max_tokens=10, max_jobs=9, min_jobs=2)
    window.take(1000)
    assert window.room() == Room(1, 1, MAX_BYTES)
    window.take(1000)
    assert window.room() is None


def test_a_waiting_claimer_wakes_when_credit_returns():
    window = Window(max_tokens=10, max_jobs=1)
    window.take(10)
    assert window.wait_for_room(0.0) is None
    found = []
    waiter = threading.Thread(target=lambda: found.append(window.wait_for_room(30)))
    waiter.start()
    window.give_back(10)
    waiter.join(30)
    assert found == [Room(1, 10, MAX_BYTES)]


def test_a_limit_can_be_lowered_below_what_is_in_flight_and_raised_again():
    window = Window(max_tokens=100, max_jobs=9, min_jobs=2)
    for _ in range(3):
        window.take(30)
    window.limit(50)
    assert window.max_tokens == 50
    assert window.room() is None
    window.give_back(30)
    window.give_back(30)
    assert window.room() == Room(8, 20, MAX_BYTES)
    window.limit(1)
    assert window.room() == Room(1, 1, MAX_BYTES)  # the second block, whatever the limit
    window.limit(100)
    assert window.room() == Room(8, 70, MAX_BYTES)


def test_a_paused_window_has_room_for_nothing_and_wakes_its_claimer_when_it_is_over():
    window = Window(max_tokens=10, max_jobs=2, min_jobs=2)
    window.pause(True)
    assert window.room() is None
    found = []
    waiter = threading.Thread(target=lambda: found.append(window.wait_for_room(30)))
    waiter.start()
    window.pause(False)
    waiter.join(30)
    assert found == [Room(2, 10, MAX_BYTES)]


def test_bytes_are_bounded_whatever_the_tokens_say():
    window = Window(max_tokens=1000, max_jobs=9, min_jobs=2, max_bytes=100)
    window.take(1, 60)
    assert window.room() == Room(8, 999, 40)
    window.take(1, 70)
    assert window.room() is None
    window.give_back(1, 60)
    assert window.room() == Room(8, 999, 30)


@pytest.mark.parametrize(
    ("tokens_per_s", "step_tokens", "held"),
    [
        (0.0, 1024, 3072),  # the speed is not known yet
        (3_000.0, 1024, 3072),
        (200_000.0, 4096, 20_000),
        (200_000.0, 16_384, 49_152),
        (9_000_000.0, 16_384, 65_536),
        (50_000.0, 0, 65_536),  # no steps
    ],
)
def test_queries_that_a_worker_holds_are_a_tenth_of_a_second_or_three_steps(
    tokens_per_s, step_tokens, held
):
    assert interactive_tokens(tokens_per_s, step_tokens) == held
