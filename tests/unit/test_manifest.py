import re
import shutil
import sqlite3

import numpy as np
import pytest
from index_oracle import SPEC

from vecfleet.common.errors import CorruptManifest, SpaceMismatch, StaleWriter, Unavailable
from vecfleet.worker import manifest as module
from vecfleet.worker.manifest import FILE_NAME, Manifest
from vecfleet.worker.partition_state import Change, IndexEntry, PartitionSpec, SegmentEntry


def entry(number: int) -> SegmentEntry:
    return SegmentEntry(number, number, f"seg-{number}", 100, 1000, number)


@pytest.fixture
def manifest(tmp_path):
    manifest = Manifest.open(tmp_path, SPEC, 1)
    yield manifest
    manifest.close()


def test_a_commit_is_seen_by_a_reader_with_its_deltas(manifest, tmp_path):
    manifest.commit(1, Change(add_segments=[entry(1)], shard_keys=[b"a" * 16]))
    reader = Manifest.open_to_read(tmp_path)
    before = reader.data_version()
    state, deltas = reader.deltas(0)
    assert (state.generation, deltas) == (1, [])
    assert reader.data_version() == before
    manifest.commit(1, Change(add_segments=[entry(2)], deaths={1: np.array([3, 5])}))
    assert reader.data_version() != before
    state, deltas = reader.deltas(1)
    assert [e.number for e in state.segments] == [1, 2]
    assert [(n, rows.tolist()) for n, rows in deltas] == [(1, [3, 5])]
    assert reader.deltas(2)[1] == []
    assert state.next_number == 3
    reader.close()


def test_removed_segments_take_their_deaths_and_indexes_along(manifest):
    index = IndexEntry(1, "idx", "ivf", "h", 4, 10, 1)
    change = Change(add_segments=[entry(1)], deaths={1: np.array([0])}, put_indexes=[index])
    assert manifest.commit(1, change).indexes == (index,)
    state = manifest.commit(1, Change(add_segments=[entry(2)], remove_segments=[1]))
    assert state.files == {"seg-2"}
    assert manifest.deltas(0)[1] == []
    manifest.check()


def test_many_deltas_of_a_segment_are_folded_and_say_the_same(manifest, monkeypatch):
    monkeypatch.setattr(module, "FOLD_DELTAS", 4)
    manifest.commit(1, Change(add_segments=[entry(1)]))
    followed: set[int] = set()
    generation = 1
    for row in range(20):
        generation = manifest.commit(1, Change(deaths={1: np.array([row])})).generation
        if row % 3 == 0:
            for _, rows in manifest.deltas(generation - 3)[1]:
                followed.update(rows.tolist())
    assert followed | {19} == set(range(20))
    deltas = manifest.deltas(0)[1]
    assert len(deltas) <= 5
    assert sorted(r for _, rows in deltas for r in rows.tolist()) == list(range(20))
    manifest.check()


def test_applied_shards_are_remembered_and_the_oldest_forgotten(manifest, monkeypatch):
    monkeypatch.setattr(module, "MAX_APPLIED", 100)
    monkeypatch.setattr(module, "PRUNE_SLACK", 10)
    keys = [n.to_bytes(16, "little") for n in range(1200)]
    for start in range(0, 1200, 30):
        manifest.commit(1, Change(shard_keys=keys[start : start + 30]))
    found = manifest.applied(keys)
    assert set(keys[-100:]) <= found
    assert len(found) <= 150
    assert keys[0] not in found


def test_a_writer_that_was_superseded_cannot_commit(manifest, tmp_path):
    manifest.commit(1, Change(add_segments=[entry(1)]))
    newer = Manifest.open(tmp_path, SPEC, 2)
    with pytest.raises(StaleWriter):
        manifest.commit(1, Change(add_segments=[entry(2)]))
    with pytest.raises(StaleWriter):
        Manifest.open(tmp_path, SPEC, 1)
    assert [e.number for e in newer.state().segments] == [1]
    newer.close()


def test_another_space_or_dimension_is_refused(manifest, tmp_path):
    for spec in (
        PartitionSpec(SPEC.uid, "other", 16),
        PartitionSpec(SPEC.uid, "space", 32),
        PartitionSpec("1" * 32, "space", 16),
    ):
        with pytest.raises(SpaceMismatch):
            Manifest.open(tmp_path, spec, 2)
    assert manifest.state().token == 1


def test_the_watermark_only_rises(manifest):
    assert manifest.commit(1, Change(watermark=7)).watermark == 7
    assert manifest.commit(1, Change(watermark=5)).watermark == 7


def test_a_crash_before_the_commit_changes_nothing(manifest):
    class Killed(BaseException):
        pass

    def crash(name):
        if name == "before commit":
            raise Killed

    with pytest.raises(Killed):
        manifest.commit(1, Change(add_segments=[entry(1)]), crash)
    assert manifest.state().segments == ()
    manifest.commit(1, Change(add_segments=[entry(1)]))


def test_there_is_nothing_to_read_before_a_writer_came(tmp_path):
    with pytest.raises(Unavailable):
        Manifest.open_to_read(tmp_path)


def filled(directory) -> bytes:
    manifest = Manifest.open(directory, SPEC, 1)
    for number in range(1, 30):
        deaths = {number - 1: np.arange(50)} if number > 1 else {}
        change = Change(add_segments=[entry(number)], deaths=deaths, shard_keys=[b"%016d" % number])
        manifest.commit(1, change)
    manifest.close()  # the last connection: everything is in the one file now
    return (directory / FILE_NAME).read_bytes()


def facts(manifest: Manifest) -> list:
    state, deltas = manifest.deltas(0)
    return [state, sorted((n, rows.tolist()) for n, rows in deltas)]


def test_flipped_bytes_are_noticed_or_harmless(tmp_path):
    data = filled(tmp_path)
    healthy = Manifest.open_to_read(tmp_path)
    truth = facts(healthy)
    healthy.close()
    generator = np.random.default_rng(3)
    noticed = 0
    for turn, place in enumerate(generator.choice(len(data), 400, replace=False).tolist()):
        directory = tmp_path / str(turn)
        directory.mkdir()
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(generator.integers(8))
        (directory / FILE_NAME).write_bytes(damaged)
        try:
            manifest = Manifest.open_to_read(directory)
            try:
                manifest.check()
                assert facts(manifest) == truth
            finally:
                manifest.close()
        except CorruptManifest as error:
            assert FILE_NAME in error.message
            noticed += 1
        except Unavailable:
            noticed += 1  # it no longer looks like a manifest at all
        shutil.rmtree(directory)
    assert noticed > 50


def test_rows_that_vanish_are_noticed(tmp_path):
    filled(tmp_path)
    for statement in (
        "DELETE FROM segments WHERE number = 7",
        "DELETE FROM deaths WHERE segment = 7",
        "DELETE FROM state",
        "DROP TABLE templates",
    ):
        copy = tmp_path / "copy"
        copy.mkdir()
        shutil.copy(tmp_path / FILE_NAME, copy / FILE_NAME)
        raw = sqlite3.connect(copy / FILE_NAME)
        raw.execute(statement)
        raw.commit()
        raw.close()
        with pytest.raises(CorruptManifest):
            Manifest.open(copy, SPEC, 1)
        shutil.rmtree(copy)


@pytest.mark.parametrize("length", [0, 100, 4096, 5000])
def test_a_cut_manifest_is_noticed(tmp_path, length):
    data = filled(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(data[:length])
    with pytest.raises((CorruptManifest, Unavailable)):
        Manifest.open_to_read(tmp_path).check()


def _opened_after(tmp_path, change):
    """Two commits in SQLite's log, as a kill leaves them, and ``change(folder)`` after it."""
    writer = Manifest.open(tmp_path / "live", SPEC, 1)
    writer.commit(1, Change(add_segments=[entry(1)]))
    writer.commit(1, Change(add_segments=[entry(2)]))
    shutil.copytree(tmp_path / "live", tmp_path / "left")
    writer.close()
    change(tmp_path / "left")
    return Manifest.open(tmp_path / "left", SPEC, 2)


def test_a_damaged_log_is_not_taken_for_one_that_a_crash_cut(tmp_path):
    (tmp_path / "live").mkdir()

    def flip_in_the_last_commit(folder):
        log = folder / "manifest.db-wal"
        data = bytearray(log.read_bytes())
        data[-100] ^= 1
        log.write_bytes(data)

    with pytest.raises(CorruptManifest, match="generation 1, but 2 was committed"):
        _opened_after(tmp_path, flip_in_the_last_commit)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            b"CREATE TABLE state (one INTEGER PRIMARY KEY",
            b"CREATE TABLE state (one INTEGER PRIMARX KEY",
        ),
        (b"key BLOB NOT NULL UNIQUE", b"key BLOB NOT NULL UNIQUD"),
        (b"deaths_by_generation ON", b"deaths_by_generatioo ON"),
        (b"(segment INTEGER PRIMARY", b"(segment INTEGER PRIMAR\xff"),
    ],
)
def test_damaged_tables_are_not_taken_for_what_they_say(tmp_path, old, new):
    """Of a PRIMARX KEY two rows are one: the one with the older token was found, as if fenced."""
    Manifest.open(tmp_path, SPEC, 1).close()
    path = tmp_path / FILE_NAME
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    with pytest.raises(CorruptManifest, match=re.escape(str(path))):
        Manifest.open(tmp_path, SPEC, 2)


@pytest.mark.parametrize("keep", [0, 4096])
def test_a_log_that_was_cut_is_noticed(tmp_path, keep):
    (tmp_path / "live").mkdir()

    def cut(folder):
        log = folder / "manifest.db-wal"
        log.write_bytes(log.read_bytes()[:keep])

    with pytest.raises(CorruptManifest):
        _opened_after(tmp_path, cut)


def test_a_mark_that_is_damaged_or_behind_changes_nothing(tmp_path):
    (tmp_path / "live").mkdir()
    _opened_after(tmp_path, lambda folder: (folder / "manifest.mark").write_bytes(b"x")).close()
    manifest = Manifest.open(tmp_path / "left", SPEC, 3)
    assert manifest.state().generation == 2
    manifest.close()


def test_an_empty_manifest_beside_segments_is_not_taken_for_a_new_one(tmp_path):
    """Else the writer would begin anew and remove the segments that nobody names."""
    (tmp_path / FILE_NAME).write_bytes(b"")
    (tmp_path / "seg-00000001-1.seg").write_bytes(b"rows")
    with pytest.raises(CorruptManifest, match="segments"):
        Manifest.open(tmp_path, SPEC, 1)
    assert (tmp_path / "seg-00000001-1.seg").exists()
