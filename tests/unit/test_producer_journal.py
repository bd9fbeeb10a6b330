"""The journal: what it keeps over crashes, and what it refuses."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vecfleet.common.errors import ConfigError
from vecfleet.producer.journal import BlockRecord, Journal

NAMES = {"collection": "c", "uid": "u" * 32}


def begin(path, submission="s1"):
    return Journal.open(path, submission=submission, **NAMES)


def test_what_was_noted_is_there_again(tmp_path):
    path = tmp_path / "deep" / "j.jsonl"
    journal = begin(path)
    assert not journal.blocks and journal.last_version() is None
    journal.sent(0, BlockRecord("d0", 256, 0, 100))
    journal.sent(1, BlockRecord("d1", 250, 6, 101))
    journal.done(1, 249, 1)
    journal.same(2, "d2", 256)
    journal.sync()
    journal.close()
    again = Journal.open(path, submission=None, **NAMES)
    assert again.submission == "s1"
    assert again.blocks == {
        0: BlockRecord("d0", 256, 0, 100),
        1: BlockRecord("d1", 250, 6, 101, 249, 1, is_settled=True),
        2: BlockRecord("d2", 0, 256, is_settled=True),
    }
    assert again.last_version() == (1, 101)
    again.remove()
    assert not path.exists()


def test_a_version_once_known_is_kept(tmp_path):
    path = tmp_path / "j"
    journal = begin(path)
    journal.sent(0, BlockRecord("d", 2, 0, 77))
    journal.sent(0, BlockRecord("d", 2, 0, 0))  # the second run was told that it was queued already
    journal.close()
    assert begin(path).blocks[0].version == 77


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_crash_loses_at_most_the_line_it_cut(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("j") / "j"
    journal = begin(path)
    for place in range(5):
        journal.sent(place, BlockRecord(f"d{place}", 3, 0, place + 1))
        journal.done(place, 3, 0)
    journal.close()
    raw = path.read_bytes()
    header = raw.index(b"\n") + 1
    cut = data.draw(st.integers(header, len(raw)))
    path.write_bytes(raw[:cut])
    again = begin(path)
    whole = raw[:cut].count(b"\n") - 1
    assert len(again.blocks) == (whole + 1) // 2
    assert sum(block.is_settled for block in again.blocks.values()) == whole // 2
    again.done(0, 3, 0) if again.blocks else again.same(0, "d0", 3)
    again.close()
    begin(path).close()  # what was appended after the cut stands on a line of its own


def test_two_processes_cannot_share_one(tmp_path):
    journal = begin(tmp_path / "j")
    with pytest.raises(ConfigError, match="in use"):
        begin(tmp_path / "j")
    journal.close()
    begin(tmp_path / "j").close()


def test_another_submission_collection_or_file_is_refused(tmp_path):
    path = tmp_path / "j"
    begin(path).close()
    with pytest.raises(ConfigError, match="belongs to submission s1"):
        begin(path, "s2")
    with pytest.raises(ConfigError, match="another collection"):
        Journal.open(path, submission="s1", collection="c", uid="v" * 32)
    path.write_text(json.dumps({"journal": 2}) + "\n")
    with pytest.raises(ConfigError, match="another version"):
        begin(path)
    for text in ("hello\n", '{"journal": 1, "submission": "s1", "uid": "%s"}\n[1]\n' % ("u" * 32)):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no journal"):
            begin(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="journal"):
        begin(tmp_path / "folder")


def test_a_missing_journal_names_no_submission(tmp_path):
    assert Journal.open(tmp_path / "j", submission=None, **NAMES) is None
