"""The harness can fail: planted defects and mutants are caught, and without them all is well."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
from chaos import crash_points
from chaos.client_ledger import ClientLedger, Entry, read
from chaos.fleet import ASSIGNED, GIVEN
from chaos.mutants import MUTANTS
from chaos.scenes import with_mutant_planted, without_mutants
from chaos.story import digest, operation, revision_of, text_of
from chaos.verdict import Buried, Held, Verdict, judge

from vecfleet.worker.fake_engine import POISON, fake_vector

CAUGHT_AS = {
    "planted_loss": "lost",
    "planted_double": "doubled",
    "no_version_check": "lost",
    "settle_before_commit": "lost",
    "no_fence": "doubled",
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_harness_catches(mutant, tmp_path):
    verdict = with_mutant_planted(tmp_path, mutant, seed=11)
    assert getattr(verdict, CAUGHT_AS[mutant]), str(verdict)


def test_the_same_scenes_without_a_mutant_are_well(tmp_path):
    verdict, strange = without_mutants(tmp_path, seed=11)
    assert verdict.is_kept and not strange, (str(verdict), strange)
    assert verdict.acknowledged > 100


def test_a_point_that_wraps_nothing_is_an_error(monkeypatch):
    with pytest.raises(LookupError):
        crash_points.install("worker.after_lunch", 1)
    gone = crash_points.Point("vecfleet.worker.ledger:Ledger.settle_quickly")
    monkeypatch.setitem(crash_points.POINTS, "worker.gone", gone)
    with pytest.raises(LookupError, match="the product has changed"):
        crash_points.install("worker.gone", 1)


@pytest.mark.parametrize("name", crash_points.POINTS)
def test_every_point_names_something(name):
    crash_points.find(crash_points.POINTS[name].target)


def test_a_ledger_forgets_the_line_that_a_crash_cut_off(tmp_path):
    path = tmp_path / "client.ledger"
    ledger = ClientLedger(path, "c")
    first = operation(1, "client", 0, may_delete=False)
    ledger.acknowledge(first)
    with path.open("a") as file:
        file.write(json.dumps({"number": 1})[:-3])
    assert ClientLedger(path, "c").next == 1
    assert [entry.id for entry in read(path)] == list(first.ids)


def test_a_text_that_nobody_wrote_has_no_revision():
    assert revision_of("a:1", text_of("a:1", 7)) == 7
    assert revision_of("a:1", text_of("a:2", 7)) == 0
    assert revision_of("a:1", text_of("a:1", 7) + "!") == 0


def put(id: str, revision: int, collection: str = GIVEN) -> Entry:
    return Entry(collection, id, revision, digest(text_of(id, revision)))


def verdict_over(entries, copies, dead=(), *, vectors=None, deaths=None) -> Verdict:
    """``copies`` are (id, revision) that can be seen; ``dead`` are in the dead letter.

    Of the dead each has a job of its own, and ``deaths`` workers died with each.
    """
    visible = defaultdict(list)
    for id, revision in copies:
        visible[id].append((text_of(id, revision), revision))
    stored = {id: fake_vector(found[-1][0], 32) for id, found in visible.items()}
    letter = [Buried(f"job{n}", id, text_of(id, rev)) for n, (id, rev) in enumerate(dead)]
    verdict = Verdict()
    held = {GIVEN: Held(visible, {**stored, **(vectors or {})}), ASSIGNED: Held({}, {})}
    judge(entries, held, letter, verdict, {one.job: deaths for one in letter} if deaths else None)
    return verdict


def test_the_oracle_tells_what_is_well_from_what_is_not():
    assert verdict_over([put("a", 1), put("a", 2)], [("a", 2)]).is_kept
    assert verdict_over([put("a", 1)], [("a", 2)]).is_kept  # sent, and not acknowledged yet
    assert verdict_over([put("a", 1)], [], [("a", 1)], deaths=3).is_kept
    assert verdict_over([Entry(GIVEN, "a", 2, "")], []).is_kept
    assert verdict_over([put("a", 1)], []).lost
    assert verdict_over([put("a", 1), put("a", 2)], [("a", 1)]).lost
    assert verdict_over([put("a", 2)], [], [("a", 1)], deaths=3).lost
    assert verdict_over([put("a", 1), Entry(GIVEN, "a", 2, "")], [("a", 1)]).lost
    assert verdict_over([put("a", 1)], [("a", 1), ("a", 1)]).doubled
    assert verdict_over([put("a", 1)], [("a", 1)], [("a", 1)], deaths=3).doubled
    wrong = {"a": np.eye(32, dtype=np.float32)[0]}
    assert verdict_over([put("a", 1)], [("a", 1)], vectors=wrong).lost


def test_a_fleet_that_buries_what_it_could_do_fails():
    calls = [put(f"{n}", 1) for n in range(20)]
    everything = [(entry.id, 1) for entry in calls]
    assert len(verdict_over(calls, [], everything).lost) == 20
    assert len(verdict_over(calls, [], everything, deaths=2).lost) == 20
    assert verdict_over(calls, [], everything, deaths=3).worn == 20


def test_only_what_redis_forgot_may_be_in_the_index_and_in_the_dead_letter():
    text = text_of("a", 1)
    held = {GIVEN: Held({"a": [(text, 1)]}, {"a": fake_vector(text, 32)})}
    for deaths, lost_data, doubled in ((3, True, 0), (3, False, 1), (2, True, 1)):
        verdict = Verdict()
        letter = [Buried("s", "a", text)]
        judge([put("a", 1)], held, letter, verdict, {"s": deaths}, redis_lost_data=lost_data)
        assert (len(verdict.doubled), verdict.forgotten) == (doubled, 1 - doubled)


def test_what_cannot_be_done_may_be_buried_once():
    text = f"some {POISON}"
    entry = Entry(GIVEN, "a", 1, digest(text))
    for times in (1, 2):
        verdict = Verdict()
        judge([entry], {}, [Buried(f"s-{n}", "a", text) for n in range(times)], verdict)
        assert not verdict.lost and len(verdict.doubled) == times - 1


def test_deletions_that_were_buried_cannot_be_told_apart():
    verdict = Verdict()
    letter = [Buried("s", "a", None), Buried("t", "a", None)]
    judge([Entry(GIVEN, "a", 2, "")], {}, letter, verdict, {"s": 3, "t": 3})
    assert verdict.is_kept
