"""What clients note is read back as it was meant, and a power cut is judged by it."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import pytest
from chaos.client_ledger import ClientLedger, read, read_calls, read_collections, read_notes
from chaos.complaints import complaints
from chaos.fleet import Fleet
from chaos.power import Growth, Lost, PowerCut, append_only_file, power_cut
from chaos.power import complaints as complaints_about_power
from chaos.scenes import QUICK
from chaos.story import cured_text_of, digest, may_die, operation, revision_of, text_of

from vecfleet.fleet.redis_server import RedisServer


def first(number=0):
    return operation(1, "client", number, may_delete=False)


def test_what_goes_with_a_collection_is_not_expected_any_more(tmp_path):
    path = tmp_path / "keeper.ledger"
    ledger = ClientLedger(path, "news")
    ledger.acknowledge(first(), collection="a")
    ledger.acknowledge(replace(first(1), ids=()), collection="a", exists=False)
    ledger.acknowledge(first(2), collection="b")
    assert {entry.collection for entry in read(path)} == {"b"}
    assert [call.number for call in read_calls(path)] == [2]
    assert read_collections(path) == {"a": False, "b": True}
    ledger.acknowledge(first(3), collection="a")
    assert read_collections(path)["a"]
    assert [call.number for call in read_calls(path)] == [2, 3]


def test_notes_are_no_acknowledgements(tmp_path):
    path = tmp_path / "client.ledger"
    ledger = ClientLedger(path, "news")
    ledger.note("accepted", 0, submission="5ub")
    assert ClientLedger(path, "news").next == 0
    assert not list(read(path))
    assert [note.fields["submission"] for note in read_notes(path, "accepted")] == ["5ub"]
    assert not read_notes(path, "lost")


def test_what_was_dropped_counts_as_gone(tmp_path):
    path = tmp_path / "poison.ledger"
    now = replace(first(), ids=("good", "bad!abort"))
    ClientLedger(path, "news").acknowledge(now, {"bad!abort": ""}, submission="5ub")
    assert [entry.is_delete for entry in read(path)] == [False, True]
    (call,) = read_calls(path)
    assert (call.documents, call.dropped, call.is_delete) == (2, 1, False)


@pytest.mark.parametrize("kind", ["raise", "abort", "hang", "break", "nan"])
def test_a_text_that_may_die_is_known_by_its_id(kind):
    id = f"client:1!{kind}"
    assert may_die(text_of(id, 3))
    assert not may_die(cured_text_of(id, 3))
    assert revision_of(id, text_of(id, 3)) == revision_of(id, cured_text_of(id, 3)) == 3
    assert digest(text_of(id, 3)) != digest(cured_text_of(id, 3))
    assert not may_die(text_of("client:1!memory", 3))


def test_what_was_lost_too_late_or_unnoticed_is_told(tmp_path):
    path = tmp_path / "http.ledger"
    ledger = ClientLedger(path, "news")
    cut_s = time.monotonic()

    def told(age_s, *, was_done=False):
        cut = PowerCut(cut_s, (Lost("http", 0, "5ub", age_s, was_done),))
        return complaints_about_power([cut], [path], everysec=True)

    assert "nobody noticed" in told(0.5)[0]
    assert not told(0.5, was_done=True)
    ledger.note("lost", 0, submission="5ub")
    assert not told(0.5)
    assert told(2.5)
    # Gone with one cut, and still away at the next.
    cuts = [
        PowerCut(cut_s + later_s, (Lost("http", 0, "5ub", 0.5 + later_s, False),))
        for later_s in (0.0, 3.0)
    ]
    ledger.note("lost", 0, submission="5ub")
    assert not complaints_about_power(cuts, [path], everysec=True)
    assert complaints_about_power(cuts[1:], [path], everysec=True)


def test_a_deletion_that_is_asked_for_anew_is_not_lost_with_its_first_submission(tmp_path):
    path = tmp_path / "http.ledger"
    ledger = ClientLedger(path, "news")
    with RedisServer(tmp_path / "redis") as server:

        def lost():
            cut = power_cut(server.client(), [path], time.monotonic())
            return [one.submission for one in cut.lost]

        ledger.note("deleting", 7)
        ledger.note("accepted", 7, submission="f1r5t")
        ledger.note("accepted", 8, submission="0ther")
        assert lost() == ["f1r5t", "0ther"]
        ledger.note("deleting", 7)  # the client died and begins again
        assert lost() == ["0ther"]
        ledger.note("accepted", 7, submission="5ec0nd")
        assert lost() == ["0ther", "5ec0nd"]


def test_the_last_second_of_the_file_goes_and_nothing_else(tmp_path):
    with RedisServer(tmp_path, extra=["--appendfsync", "everysec"]) as server:
        client = server.client()
        growth = Growth(server).start()
        client.set("early", 1)
        end = time.monotonic() + 1.5
        written = []
        while time.monotonic() < end:
            written.append(time.monotonic())
            client.set("late", written[-1])
        before = append_only_file(server).stat().st_size
        server.kill()
        died_s = time.monotonic()
        growth.stop()
        looked = growth.look_at(died_s - 1.0, append_only_file(server))
        gone = growth.cut_off_the_last_second(died_s)
        assert append_only_file(server).stat().st_size == before - gone
        server.start()
        assert client.get("early") == b"1"
        # What stood there when we looked is kept, but for a command or two.
        kept = sum(at <= looked[0] for at in written) if looked else len(written)
        assert written.index(float(client.get("late"))) == pytest.approx(kept - 1, abs=5)
        assert gone > 0 or looked is None
        assert looked is None or looked[0] > died_s - 1.3  # a second and a look, no more
        if max(after - at for at, after in pairwise([*written, died_s])) < 0.1:  # not held up
            assert float(client.get("late")) == pytest.approx(end - 1.0, abs=0.3)
        server.kill()  # and again at once: nothing is left that is younger than our last look
        size = append_only_file(server).stat().st_size
        assert 0 <= growth.cut_off_the_last_second(time.monotonic()) < size
        server.start()
        client.close()


def test_wrong_answers_and_collections_that_came_back_are_told(tmp_path):
    fleet = Fleet(tmp_path, QUICK)
    ledger = ClientLedger(tmp_path / "asker0.ledger", "news")
    ledger.acknowledge(replace(first(), ids=()), collection="gone", exists=False)
    ledger.acknowledge(first(1), collection="here")
    assert not complaints(fleet, {"here"})
    assert "was deleted" in complaints(fleet, {"here", "gone"})[0]
    assert "was created" in complaints(fleet, set())[0]
    ledger.note("wrong", 2, said="another vector")
    assert "another vector" in complaints(fleet, {"here"})[0]
