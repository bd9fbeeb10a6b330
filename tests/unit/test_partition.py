import errno
import mmap
import os
import sqlite3
from contextlib import suppress
from dataclasses import replace

import pytest
from few_files import few_files_left
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_oracle import (
    SPEC,
    Oracle,
    check_liveness,
    check_reader,
    open_writer,
    settle,
    shard,
)

from vecfleet.common.errors import InvalidVector, SpaceMismatch, StaleWriter, Unavailable
from vecfleet.worker.partition import QUARANTINE
from vecfleet.worker.partition_reader import PartitionReader


@pytest.fixture
def writer(tmp_path):
    writer = open_writer(tmp_path)
    yield writer
    writer.close()


def test_one_call_writes_one_segment_and_one_generation(writer, tmp_path):
    shards = [shard(f"s{k}", [(f"d{k}-{i}", 1) for i in range(20)]) for k in range(5)]
    outcomes = writer.apply(shards)
    assert [(o.shard_id, o.status, o.rows) for o in outcomes] == [
        (f"s{k}", "applied", 20) for k in range(5)
    ]
    stats = writer.stats()
    assert (stats.documents, stats.segments, stats.generation) == (100, 1, 1)
    assert stats.nbytes == sum(p.stat().st_size for p in tmp_path.glob("*.seg"))


def test_a_shard_counts_once(writer):
    first = shard("s", [("a", 1)])
    twice = writer.apply([first, first])
    assert [o.status for o in twice] == ["applied", "duplicate"]
    assert [o.status for o in writer.apply([first])] == ["duplicate"]
    assert writer.stats().generation == 1


def test_a_wrong_shard_is_rejected_and_the_others_are_applied(writer):
    outcomes = writer.apply(
        [
            shard("1", [("a", 1)], space="other"),
            shard("2", [("b", 1)], dimension=8),
            shard("3", [("c", 1)]),
        ]
    )
    assert [o.status for o in outcomes] == ["rejected", "rejected", "applied"]
    assert isinstance(outcomes[0].error, SpaceMismatch)
    assert isinstance(outcomes[1].error, InvalidVector)
    assert writer.stats().documents == 1
    assert writer.apply([shard("1", [("a", 1)])])[0].status == "applied"


ROW = st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 5))
SHARD = st.tuples(st.lists(ROW, max_size=6), st.lists(ROW, max_size=3)).filter(
    lambda s: s[0] or s[1]
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(SHARD, st.integers(0, 3), st.booleans(), st.booleans()), max_size=14),
    st.randoms(use_true_random=False),
)
def test_the_highest_version_lives_whatever_the_order(tmp_path_factory, steps, random):
    """Upserts, deletes, ties, duplicates, late deliveries, reopening: always as the dict says."""
    directory = tmp_path_factory.mktemp("partition")
    writer, oracle, delivered = open_writer(directory), Oracle(), []
    reader = PartitionReader.open(directory)
    for number, ((documents, deletes), repeats, flush, reopen) in enumerate(steps):
        delivered.append((f"s{number}", documents, deletes))
        batch = [delivered[-1]] + [random.choice(delivered) for _ in range(repeats)]
        for group in [batch] if flush else [[one] for one in batch]:
            writer.apply([shard(*one) for one in group])
            for one in group:
                oracle.apply(*one)
        if reopen:
            writer.close()
            writer = open_writer(directory)
        reader.refresh()
        assert writer.stats().documents == len(oracle.living()) == reader.stats().documents
    check_reader(reader, oracle)
    check_liveness(reader)
    fresh = PartitionReader.open(directory)
    check_reader(fresh, oracle)
    for followed, derived in zip(reader._present().parts, fresh._present().parts, strict=True):
        assert (followed.liveness.alive == derived.liveness.alive).all()
    for closable in (reader, fresh, writer):
        closable.close()


def test_leftovers_are_removed_when_the_partition_is_opened(writer, tmp_path):
    writer.apply([shard("s", [("a", 1)])])
    writer.close()
    for name in ("seg-00000099-1.seg", "seg-00000100-1.seg.tmp", "idx-1.faiss"):
        (tmp_path / name).write_text("x")
    again = open_writer(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= {
        "manifest.db",
        "manifest.db-wal",
        "manifest.db-shm",
        "manifest.mark",
        "seg-00000001-1.seg",
    }
    assert again.stats().documents == 1
    again.close()


def test_a_damaged_segment_goes_to_quarantine_and_the_rest_serves(writer, tmp_path):
    oracle = Oracle()
    for name, rows in (("1", [("a", 1), ("b", 1)]), ("2", [("b", 2), ("c", 1)])):
        writer.apply([shard(name, rows)])
    writer.close()
    victim = tmp_path / "seg-00000002-1.seg"
    data = bytearray(victim.read_bytes())
    data[4100] ^= 1
    victim.write_bytes(data)
    reader = PartitionReader.open(tmp_path)
    assert reader.stats().quarantined == (victim.name,)
    again = open_writer(tmp_path)
    assert again.stats().quarantined == (victim.name,)
    assert (tmp_path / QUARANTINE / victim.name).exists()
    assert again.apply([shard("3", [("b", 3)])])[0].status == "applied"
    oracle.apply("1", [("a", 1), ("b", 3)])  # the old b stays dead: better missing than stale
    reader.refresh()
    check_reader(reader, oracle)
    again.close()
    third = open_writer(tmp_path)
    assert third.stats().documents == 2
    third.close()
    reader.close()


def test_a_stale_writer_removes_no_files_of_the_next_one(writer, tmp_path):
    writer.apply([shard("1", [("a", 1)])])
    newer = open_writer(tmp_path, 2)
    newer.apply([shard("2", [("b", 1)])])
    with pytest.raises(StaleWriter):
        writer._remove_leftovers()
    assert len(list(tmp_path.glob("*.seg"))) == 2
    newer.close()


def test_what_is_applied_says_only_who_may_still_apply(tmp_path):
    frozen = open_writer(tmp_path)
    frozen.apply([shard("1", [("a", 1)])])
    assert frozen.applied(["1", "2"]) == {"1"}
    heir = open_writer(tmp_path, 2)
    with pytest.raises(StaleWriter):
        frozen.applied(["2"])
    assert heir.applied(["1", "2"]) == {"1"}
    frozen.close()
    heir.close()


def test_a_writer_that_is_overtaken_between_writing_and_committing_publishes_nothing(tmp_path):
    heirs = []

    def overtaken(step):
        if step == "renamed":  # the segment is there, the manifest does not name it yet
            heirs.append(open_writer(tmp_path, 2))

    frozen = open_writer(tmp_path, crash=overtaken)
    with pytest.raises(StaleWriter):
        frozen.apply([shard("1", [("a", 1)])])
    (heir,) = heirs
    assert heir.apply([shard("1", [("a", 1)])])[0].status == "applied"
    assert heir.stats().documents == 1
    frozen.close()
    heir.close()


def test_a_stale_writer_publishes_nothing(writer, tmp_path):
    writer.apply([shard("1", [("a", 1)])])
    newer = open_writer(tmp_path, 2)
    newer.apply([shard("2", [("b", 1)])])
    with pytest.raises(StaleWriter):
        writer.apply([shard("3", [("c", 1)])])
    with pytest.raises(StaleWriter):
        open_writer(tmp_path, 1)
    assert newer.stats().documents == 2
    newer.close()
    again = open_writer(tmp_path, 3)
    assert again.stats().documents == 2
    assert len(list(tmp_path.glob("*.seg"))) == 2
    again.close()


def test_a_full_disk_changes_nothing_and_the_call_can_be_made_again(tmp_path):
    full = {"at": ""}

    def crash(name):
        if name == full["at"]:
            raise OSError(28, "No space left on device")

    writer = open_writer(tmp_path, crash=crash)
    writer.apply([shard("1", [("a", 1)])])
    reader = PartitionReader.open(tmp_path)
    for step in ("written", "synced"):
        full["at"] = step
        with pytest.raises(Unavailable):
            writer.apply([shard("2", [("a", 2), ("b", 1)])])
        reader.refresh()
        assert [d.version for d in reader.documents()] == [1]
        assert not list(tmp_path.glob("*.tmp"))
    full["at"] = ""
    assert writer.apply([shard("2", [("a", 2), ("b", 1)])])[0].status == "applied"
    reader.refresh()
    assert sorted((d.id, d.version) for d in reader.documents()) == [("a", 2), ("b", 1)]
    reader.close()
    writer.close()


@pytest.mark.parametrize("left", range(7))
def test_without_files_nothing_changes_and_the_call_can_be_made_again(writer, tmp_path, left):
    writer.apply([shard("1", [("a", 1)])])
    status = "applied"
    with few_files_left(left):
        with suppress(Unavailable):
            assert writer.apply([shard("2", [("a", 2)])])[0].status == status
            status = "duplicate"
        with suppress(Unavailable):
            open_writer(tmp_path / "another").close()
    assert len(list(tmp_path.glob("*.seg"))) == writer.stats().segments
    assert writer.apply([shard("2", [("a", 2)])])[0].status == status
    assert (status == "duplicate") == (left > 1)
    writer.close()
    with few_files_left(left), suppress(Unavailable):
        open_writer(tmp_path).close()
    open_writer(tmp_path).close()


def test_without_memory_for_its_map_nothing_changes(writer, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patched:
        patched.setattr(mmap, "mmap", fail)
        with pytest.raises(Unavailable, match="Cannot allocate memory"):
            writer.apply([shard("1", [("a", 1)])])
    assert not list(tmp_path.glob("*.seg"))
    assert writer.apply([shard("1", [("a", 1)])])[0].status == "applied"


def test_a_manifest_that_cannot_grow_undoes_the_segment(writer, tmp_path):
    """SQLite reports a full disk in the middle of the commit."""
    writer.apply([shard("1", [("a", 1)])])
    pages = writer._manifest.db.execute("PRAGMA page_count").fetchone()[0]
    writer._manifest.db.execute(f"PRAGMA max_page_count = {pages}")
    many = {"x" * 400 + str(i): 1 for i in range(3)}
    failed = 0
    for number in range(400):
        try:
            writer.apply([shard(f"many-{number}", [*many.items()])])
        except Unavailable:
            failed += 1
            break
    assert failed
    segments = writer.stats().segments
    assert len(list(tmp_path.glob("*.seg"))) == segments
    writer._manifest.db.execute("PRAGMA max_page_count = 1000000")
    assert writer.apply([shard("after", [("z", 1)])])[0].status == "applied"
    writer.close()
    again = open_writer(tmp_path)
    assert again.stats().segments == segments + 1
    again.close()


def test_a_commit_whose_end_is_unknown_keeps_its_file(writer, tmp_path, monkeypatch):
    """After an I/O error the log may yet bring the commit back, so the segment must be there."""
    writer.apply([shard("1", [("a", 1)])])
    real = writer._manifest.commit

    def failing(token, change, crash):
        real(token, change, crash)  # it did reach the disk
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise Unavailable("disk I/O error") from error

    monkeypatch.setattr(writer._manifest, "commit", failing)
    with pytest.raises(Unavailable):
        writer.apply([shard("2", [("a", 2)])])
    writer.close()
    again = open_writer(tmp_path)
    assert again.stats().quarantined == ()
    assert again.apply([shard("2", [("a", 2)])])[0].status == "duplicate"
    assert again.stats().documents == 1
    again.close()


def test_ids_of_all_lengths_and_alphabets(writer, tmp_path):
    ids = ["x", "ü" * 100, "日本語", "a" * 512, "http://x/?q=1", "\x7f"]
    writer.apply([shard("s", [(i, 1) for i in ids])])
    reader = PartitionReader.open(tmp_path)
    assert sorted(d.id for d in reader.documents()) == sorted(ids)
    reader.close()


def test_settled_maintenance_has_nothing_to_do(writer):
    writer.apply([shard("s", [("a", 1)])])
    assert settle(writer) == []
    assert writer.maintain().idle


def test_the_spec_is_pinned(writer, tmp_path):
    with pytest.raises(SpaceMismatch):
        open_writer(tmp_path, 5, spec=replace(SPEC, space="other"))
