"""A share of the corruptions; and proof that the judge sees what nobody noticed."""

from dataclasses import replace
from unittest import mock

import pytest
from fuzz.corruption import Subjects, Undetected
from fuzz.images import Seen, see

from vecfleet.worker.commit_mark import CommitMark
from vecfleet.worker.segment import Segment

SHARE = 200


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    return Subjects(tmp_path_factory.mktemp("corruption"))


def test_damage_is_noticed_or_changes_nothing(subjects):
    verdicts = {subjects.run("ci", number)[0] for number in range(SHARE)}
    assert verdicts == {"detected", "harmless"}


def first_undetected(subjects, most):
    for number in range(most):
        try:
            subjects.run("ci", number)
        except Undetected as fault:
            return str(fault)
    return ""


def test_a_reader_that_checks_nothing_is_found_out(subjects):
    with mock.patch.object(Segment, "_verify", lambda self, skipped: None):
        assert "seg" in first_undetected(subjects, SHARE)


def test_a_writer_without_a_mark_is_found_out(subjects):
    with mock.patch.object(CommitMark, "__init__", _no_mark):
        assert "manifest.db-wal" in first_undetected(subjects, SHARE)


@pytest.mark.parametrize("kept", [0.0, 0.9])
def test_a_reader_that_loses_more_than_what_was_damaged_is_found_out(subjects, kept):
    def forgetful(directory, thresholds, ids):
        seen = see(directory, thresholds, ids)
        if not seen.quarantined:
            return seen
        some = sorted(seen.documents)[: int(kept * len(seen.documents))]
        documents = {document: seen.documents[document] for document in some}
        return replace(seen, documents=documents, hits=(), exact=())

    with mock.patch("fuzz.corruption.see", forgetful):
        assert "wrong or missing" in first_undetected(subjects, SHARE)


def test_a_search_that_finds_nothing_beside_what_was_damaged_is_found_out(subjects):
    def blind(directory, thresholds, ids):
        seen = see(directory, thresholds, ids)
        return replace(seen, hits=()) if seen.quarantined else seen

    with mock.patch("fuzz.corruption.see", blind):
        assert "a search finds 0" in first_undetected(subjects, SHARE)


def _no_mark(self, path):
    self.generation, self._handle = 0, -1


def test_the_comparison_covers_everything_that_a_client_sees():
    fields = {"documents", "hits", "exact", "unchanged", "indexed", "quarantined"}
    assert set(Seen.__dataclass_fields__) == fields
