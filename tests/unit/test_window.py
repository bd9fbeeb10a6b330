"""Credits bound what is in flight, and never starve a long block."""

from __future__ import annotations

import threading

from vecfleet.worker.window import Room, Window


def test_room_shrinks_with_what_is_taken_and_comes_back():
    window = Window(max_tokens=100, max_jobs=3)
    assert window.room() == Room(3, 100)
    window.take(60)
    assert window.room() == Room(2, 40)
    window.take(60)
    assert window.room() is None
    window.give_back(60)
    assert window.room() == Room(2, 40)
    assert window.in_flight == (1, 60)


def test_jobs_are_bounded_too():
    window = Window(max_tokens=100, max_jobs=1)
    window.take(1)
    assert window.room() is None


def test_two_blocks_always_fit_however_long_their_texts():
    window = Window(max_tokens=10, max_jobs=9, min_jobs=2)
    window.take(1000)
    assert window.room() == Room(1, 1)
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
    assert found == [Room(1, 10)]
