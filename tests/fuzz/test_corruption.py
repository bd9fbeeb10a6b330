"""A share of the corruptions; and proof that the judge sees what nobody noticed."""

from unittest import mock

import pytest
from fuzz.corruption import Subjects, Undetected
from fuzz.images import Seen

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


def _no_mark(self, path):
    self.generation, self._handle = 0, -1


def test_the_comparison_covers_everything_that_a_client_sees():
    fields = {"documents", "hits", "exact", "unchanged", "indexed", "quarantined"}
    assert set(Seen.__dataclass_fields__) == fields
