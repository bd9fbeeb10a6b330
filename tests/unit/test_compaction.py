import os
import random
import signal
import time

import numpy as np
import pytest
from index_oracle import Oracle, check_liveness, check_reader, open_writer, settle, shard

from vecfleet.worker.compaction import FAN_IN, Weight, choose, merged
from vecfleet.worker.page import pack_pages, read_page
from vecfleet.worker.partition_reader import PartitionReader
from vecfleet.worker.rows import gather_ranges
from vecfleet.worker.segment import Segment, write_segment


@pytest.fixture
def writer(tmp_path):
    writer = open_writer(tmp_path)
    yield writer
    writer.close()


def weight(number: int, rows: int, kept: int | None = None) -> Weight:
    return Weight(number, number, rows, rows if kept is None else kept)


def test_a_full_tier_is_chosen_the_lowest_first():
    small = [weight(n, 500) for n in range(FAN_IN)]
    large = [weight(100 + n, 10_000) for n in range(FAN_IN)]
    assert choose([*large, *small]) == [w.number for w in small]
    assert choose([*large, *small[1:]]) == [w.number for w in large]
    assert choose([*large[1:], *small[1:]]) == []


def test_a_row_is_copied_about_once_a_tier():
    weights: list[Weight] = []
    copied = 0
    for number in range(1000):
        weights.append(weight(number, 4096))
        while inputs := choose(weights):
            rows = sum(w.rows for w in weights if w.number in inputs)
            weights = [w for w in weights if w.number not in inputs]
            weights.append(weight(10_000 + number, rows))
            copied += rows
    assert copied / (1000 * 4096) < 4
    assert len(weights) < 3 * FAN_IN


def test_a_segment_of_mostly_dead_rows_is_rewritten():
    assert choose([weight(1, 10_000, 4_000), weight(2, 10_000)]) == [1]
    assert choose([weight(1, 10_000, 6_000)]) == []
    assert choose([weight(1, 10, 0)]) == [1]


def test_no_segment_grows_beyond_bounds():
    assert choose([weight(n, 1 << 23) for n in range(9)]) == []


def test_ranges_are_gathered_in_order():
    data = np.arange(100, dtype=np.uint8)
    starts, lengths = np.array([5, 8, 50, 52]), np.array([3, 2, 2, 0])
    assert gather_ranges(data, starts, lengths).tolist() == [5, 6, 7, 8, 9, 50, 51]


def test_sparse_and_tiny_pages_are_packed_anew_and_others_copied(writer, tmp_path):
    writer.apply([shard("full", [(f"f{i}", 1) for i in range(64)])])
    writer.apply([shard("hollow", [(f"h{i}", 1) for i in range(64)])])
    for i in range(20):
        writer.apply([shard(f"one-{i}", [(f"one-{i}", 1)])])
    writer.apply([shard("kill", [(f"h{i}", 2) for i in range(5, 64)])])
    parts = list(writer._segments.values())
    write_segment(tmp_path / "out", 16, merged(parts, 0))
    out = Segment.open(tmp_path / "out")
    out.verify()
    before = {parts[0].segment.rows.page(p) for p in range(2)}
    after = [out.rows.page(p) for p in range(out.rows.page_count)]
    assert before < set(after)
    # 2 full pages, 2 of "kill" (27 of its 59 rows lie in a page of their own), 1 for all the rest
    assert len(after) == 5
    assert sum(len(read_page(page)) for page in after) == len(out) == 64 + 5 + 20 + 59
    assert out.rows.page_rows.tolist() == [len(read_page(page)) for page in after]
    for row in range(len(out)):
        assert out.read(row)[0].startswith(out.rows.id(row) + " ")


def test_pack_pages_of_nothing():
    pages, locators = pack_pages([])
    assert (pages, len(locators)) == ([], 0)


def test_merging_changes_nothing_that_can_be_read(writer, tmp_path):
    oracle, generator = Oracle(), random.Random(3)
    reader = PartitionReader.open(tmp_path)
    for number in range(40):
        documents = [(f"d{generator.randrange(300)}", generator.randrange(50)) for _ in range(30)]
        deletes = [(f"d{generator.randrange(300)}", generator.randrange(50)) for _ in range(3)]
        writer.apply([shard(f"s{number}", documents, deletes)])
        oracle.apply(f"s{number}", documents, deletes)
        writer.maintain()
        reader.refresh()
        check_reader(reader, oracle)
    assert settle(writer) == []
    reader.refresh()
    check_reader(reader, oracle)
    check_liveness(reader)
    assert writer.stats().segments < FAN_IN
    assert len(list(tmp_path.glob("*.seg"))) == writer.stats().segments
    again = PartitionReader.open(tmp_path)
    check_reader(again, oracle)
    again.close()
    reader.close()


def wait_until(condition, deadline_s: float = 30.0):
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_rows_that_die_during_a_merge_stay_dead(writer, tmp_path):
    oracle = Oracle()
    for number in range(FAN_IN):
        rows = [(f"d{number}-{i}", 5) for i in range(20)]
        writer.apply([shard(f"s{number}", rows)])
        oracle.apply(f"s{number}", rows)
    report = writer.maintain()
    assert len(report.started) == 1
    wait_until(lambda: list(tmp_path.glob("seg-00000009-*.seg")))
    late = ([("d0-0", 6), ("d1-1", 4), ("d2-2", 5)], [("d3-3", 9), ("d4-4", 1)])
    writer.apply([shard("late", *late)])
    oracle.apply("late", *late)
    assert settle(writer) == []
    reader = PartitionReader.open(tmp_path)
    check_reader(reader, oracle)
    check_liveness(reader)
    assert reader.stats().segments == 2
    reader.close()


def test_a_tombstone_stays_until_the_watermark_has_passed_it(writer, tmp_path):
    """Dropped early, it would let a late older version bring the document back."""
    oracle = Oracle()
    writer.apply([shard("a", [("x", 1), ("y", 1)])])
    writer.apply([shard("b", [], [("x", 10)])])
    for number in range(FAN_IN):
        writer.apply([shard(f"f{number}", [(f"f{number}", 1)])])
    assert settle(writer, watermark=10) == []  # version 10 itself is not below it
    assert writer.stats().tombstones == 1
    writer.apply([shard("late", [("x", 9)])])
    oracle.apply("all", [("y", 1), *((f"f{n}", 1) for n in range(FAN_IN))])
    reader = PartitionReader.open(tmp_path)
    check_reader(reader, oracle)
    for number in range(FAN_IN):
        writer.apply([shard(f"g{number}", [(f"f{number}", 2)])])
        oracle.apply(f"g{number}", [(f"f{number}", 2)])
    assert settle(writer, watermark=11) == []
    assert writer.stats().tombstones == 0
    reader.refresh()
    check_reader(reader, oracle)
    reader.close()


def test_segments_without_a_living_row_vanish(writer, tmp_path):
    writer.apply([shard("a", [("x", 1), ("y", 1)])])
    writer.apply([shard("b", [], [("x", 2), ("y", 2)])])
    assert settle(writer, watermark=3) == []
    stats = writer.stats()
    assert (stats.segments, stats.documents, stats.dead_rows, stats.tombstones) == (0, 0, 0, 0)
    assert not list(tmp_path.glob("*.seg"))
    writer.apply([shard("c", [("x", 3)])])
    assert writer.stats().documents == 1


def test_a_child_that_dies_is_reported_and_the_work_done_later(tmp_path):
    clock = [0.0]
    writer = open_writer(tmp_path, crash_child_at="merge synced")
    writer._upkeep._clock = lambda: clock[0]
    oracle = Oracle()
    for number in range(FAN_IN):
        writer.apply([shard(f"s{number}", [(f"d{number}", 1)])])
        oracle.apply(f"s{number}", [(f"d{number}", 1)])
    failed = settle(writer)
    assert len(failed) == 1
    assert "-9" in failed[0]
    assert not list(tmp_path.glob("*.tmp"))
    assert writer.maintain().idle  # not again at once
    clock[0] += 60
    writer._upkeep._crash_at = ""
    assert settle(writer) == []
    assert writer.stats().segments == 1
    reader = PartitionReader.open(tmp_path)
    check_reader(reader, oracle)
    reader.close()
    writer.close()


def test_a_damaged_input_is_put_into_quarantine(writer, tmp_path):
    for number in range(FAN_IN):
        writer.apply([shard(f"s{number}", [(f"d{number}", 1)])])
    victim = tmp_path / "seg-00000003-1.seg"
    data = bytearray(victim.read_bytes())
    data[4100] ^= 1
    with victim.open("r+b") as file:
        file.write(data)
    failed = settle(writer)
    assert victim.name in failed[0]
    assert writer.stats().quarantined == (victim.name,)
    assert writer.stats().documents == FAN_IN - 1
    reader = PartitionReader.open(tmp_path)
    assert len(list(reader.documents())) == FAN_IN - 1
    reader.close()


def test_a_reader_keeps_its_view_while_files_vanish(writer, tmp_path):
    oracle = Oracle()
    for number in range(FAN_IN):
        writer.apply([shard(f"s{number}", [(f"d{number}-{i}", 1) for i in range(9)])])
        oracle.apply(f"s{number}", [(f"d{number}-{i}", 1) for i in range(9)])
    reader = PartitionReader.open(tmp_path)
    assert settle(writer) == []
    assert reader.stats().segments == FAN_IN
    check_reader(reader, oracle)
    assert reader.refresh()
    assert reader.stats().segments == 1
    check_reader(reader, oracle)
    assert not reader.refresh()
    reader.close()


def test_a_file_that_vanishes_between_manifest_and_map_is_no_fault(writer, tmp_path, monkeypatch):
    for number in range(FAN_IN):
        writer.apply([shard(f"s{number}", [(f"d{number}", 1)])])
    reader = PartitionReader.open(tmp_path)
    writer.apply([shard("more", [("more", 1)])])
    real, turns = Segment.open, []

    def racing(path, **kwargs):
        if not turns:
            turns.append(path)
            assert settle(writer) == []  # merges, and removes the file that is about to be mapped
        return real(path, **kwargs)

    monkeypatch.setattr("vecfleet.worker.segment.Segment.open", racing)
    reader.refresh()
    assert turns
    assert reader.stats().quarantined == ()
    assert reader.stats().documents == FAN_IN + 1
    reader.close()


def test_the_child_ends_with_its_parent(writer):
    for number in range(FAN_IN):
        writer.apply([shard(f"s{number}", [(f"d{number}", 1)])])
    writer.maintain()
    child = writer._upkeep._mergers[True]
    pid = child.pid
    assert child._process is not None and child._process.stdin is not None
    child._process.stdin.close()  # what the kernel does for a parent that was killed
    wait_until(lambda: child._process.poll() is not None)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
