import errno
import os

import faiss
import numpy as np
import pytest
from few_files import few_files_left
from index_oracle import (
    DIMENSION,
    SMALL,
    Oracle,
    check_reader,
    open_writer,
    settle,
    shard,
    vector_of,
)

from vecfleet.common.errors import InvalidVector, Unavailable
from vecfleet.worker import partition_reader, view_builder
from vecfleet.worker.ann import FlatScan, code_distances
from vecfleet.worker.digest import content_keys, id_keys
from vecfleet.worker.exact_scan import scan, widen
from vecfleet.worker.index_policy import Thresholds
from vecfleet.worker.liveness import Liveness
from vecfleet.worker.partition_reader import PartitionReader
from vecfleet.worker.partition_state import PartitionSpec
from vecfleet.worker.search_report import StoredDocument
from vecfleet.worker.segment import Segment, joined, write_segment
from vecfleet.worker.shard import Shard, build_shard
from vecfleet.worker.signs import code_bytes, sign_codes


@pytest.fixture
def writer(tmp_path):
    writer = open_writer(tmp_path)
    yield writer
    writer.close()


def clustered(n: int, d: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, d))
    vectors = centres[generator.integers(0, 40, n)] + 0.6 * generator.standard_normal((n, d))
    vectors = vectors.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def fill(writer, vectors: np.ndarray, prefix: str = "d", version: int = 1) -> None:
    dimension = vectors.shape[1]
    for start in range(0, len(vectors), 1000):
        some = vectors[start : start + 1000]
        ids = [f"{prefix}{start + i}" for i in range(len(some))]
        data = build_shard(
            f"{prefix}-{start}-{version}",
            "space",
            dimension,
            ids=ids,
            texts=ids,
            vectors=some,
            versions=version,
        )
        writer.apply([Shard.parse(data)])


def read(reader: PartitionReader, document: str) -> StoredDocument | None:
    return next((found for _, found in reader.read([document])), None)


def test_widening_is_exact_for_every_half_a_vector_can_hold():
    bits = np.arange(1 << 16, dtype=np.uint16)
    halves = bits[(bits & 0x7C00) != 0x7C00].view(np.float16)
    assert (widen(halves) == halves.astype(np.float32)).all()


@pytest.mark.parametrize("dimension", [16, 20, 50, 384])
@pytest.mark.parametrize("queries", [1, 3, 20])
@pytest.mark.parametrize("hidden", [0, 1, 0.1, 0.95, 1.0])
def test_scans_agree_with_a_plain_product(tmp_path, dimension, queries, hidden):
    vectors = clustered(3000, dimension)
    ids = [str(i) for i in range(3000)]
    rows = Shard.parse(
        build_shard("s", "x", dimension, ids=ids, texts=ids, vectors=vectors, versions=1)
    ).rows
    write_segment(tmp_path / "s", dimension, joined([rows]))
    segment = Segment.open(tmp_path / "s")
    liveness = Liveness.of(segment.rows.tombstones)
    count = int(hidden * 3000) if isinstance(hidden, float) else hidden
    liveness.kill(np.random.default_rng(5).choice(3000, count, replace=False))
    wanted = clustered(queries, dimension, seed=7)
    scores = wanted @ segment.rows.vectors.astype(np.float32).T
    scores[:, ~liveness.visible] = -np.inf
    truth = np.sort(scores, axis=1)[:, ::-1][:, :10]
    for found in (
        FlatScan(segment).search(wanted, 10, liveness),
        scan(segment.rows.vectors, wanted, 10, liveness.visible),
    ):
        assert np.allclose(found[0], truth, atol=1e-4)
        assert (liveness.visible[found[1][found[1] >= 0]]).all()
        assert ((found[1] < 0) == np.isinf(truth)).all()
    segment.verify()  # the scan's header lies outside of every column


def test_the_scan_does_not_copy_or_change_the_file(tmp_path):
    rows = shard("s", [(f"d{i}", 1) for i in range(100)]).rows
    write_segment(tmp_path / "s", DIMENSION, joined([rows]))
    before = (tmp_path / "s").read_bytes()
    segment = Segment.open(tmp_path / "s")
    flat = FlatScan(segment)
    assert not flat._index.codes.is_owned
    assert (tmp_path / "s").read_bytes() == before


def test_hits_carry_text_and_metadata_and_obey_the_threshold(writer, tmp_path):
    writer.apply([shard("s", [("a", 3), ("b", 1)])])
    reader = PartitionReader.open(tmp_path)
    hits = list(reader.search(vector_of("a", 3)[None] * 7, 5)[0])
    assert [h.id for h in hits] == ["a", "b"]
    assert hits[0].score == pytest.approx(1.0, abs=1e-3)
    assert hits[0].text.startswith("a as of 3")
    assert hits[0].metadata == b'{"version":3}'
    assert [h.id for h in reader.search(vector_of("a", 3)[None], 5, 0.99)[0]] == ["a"]
    reader.close()


def test_a_write_is_visible_after_refresh_and_not_before(writer, tmp_path):
    reader = PartitionReader.open(tmp_path)
    assert [list(hits) for hits in reader.search(vector_of("a", 1)[None], 5)] == [[]]
    writer.apply([shard("s", [("a", 1)])])
    assert read(reader, "a") is None
    assert reader.refresh()
    assert read(reader, "a").version == 1
    assert not reader.refresh()
    writer.apply([shard("t", [], [("a", 2)])])
    reader.refresh()
    assert read(reader, "a") is None
    reader.close()


@pytest.mark.parametrize(
    "queries",
    [
        np.zeros((1, DIMENSION)),
        np.full((1, DIMENSION), np.nan),
        np.ones((1, 3)),
        np.ones(DIMENSION),
    ],
)
def test_bad_queries_are_refused(writer, tmp_path, queries):
    reader = PartitionReader.open(tmp_path)
    with pytest.raises(InvalidVector):
        reader.search(queries.astype(np.float32), 3)
    reader.close()


def test_unchanged_compares_id_text_and_metadata(writer, tmp_path):
    oracle = Oracle()
    writer.apply([shard("s", [("a", 3), ("b", 1)], [("c", 1)])])
    oracle.apply("s", [("a", 3), ("b", 1)], [("c", 1)])
    reader = PartitionReader.open(tmp_path)
    check_reader(reader, oracle)
    keys = id_keys(["a", "b", "c", "d"])
    assert reader.unchanged(keys, content_keys(["x"] * 4)).tolist() == [False] * 4
    reader.close()


def test_there_is_nothing_to_open_before_a_writer_came(tmp_path):
    with pytest.raises(Unavailable):
        PartitionReader.open(tmp_path)


def agreement(reader: PartitionReader, queries: np.ndarray, k: int = 10) -> float:
    exact = reader.search(queries, k, exact=True)
    found = reader.search(queries, k)
    pairs = zip(exact, found, strict=True)
    shared = sum(len({h.id for h in a} & {h.id for h in b}) for a, b in pairs)
    return shared / (k * len(queries))


LIMITS = Thresholds(
    exact_work=3000 * 64, large_work=2000 * 64, articles_ivf_rows=4000, articles_hnsw_rows=9000
)


@pytest.mark.parametrize(
    ("policy", "rows", "kind"),
    [("auto", 12_000, "ivf"), ("articles", 8_000, "ivf"), ("articles", 9_500, "hnsw")],
)
def test_derived_indexes_reach_the_recall_target(tmp_path, policy, rows, kind):
    spec = PartitionSpec("0" * 32, "space", 64, policy, 0.98)
    writer = open_writer(tmp_path, spec=spec, thresholds=LIMITS)
    vectors = clustered(rows, 64)
    fill(writer, vectors)
    assert settle(writer) == []
    state = writer.state
    assert {index.kind for index in state.indexes} == {kind}
    reader = PartitionReader.open(tmp_path)
    assert reader.stats().indexed_documents > rows / 2
    queries = clustered(100, 64, seed=5)
    assert agreement(reader, queries) >= 0.97
    # dead rows are never found, and those that took their place are
    fill(writer, clustered(3000, 64, seed=8), version=2)
    reader.refresh()
    moved = {f"d{i}" for i in range(3000)}
    for hits in reader.search(vectors[:50], 10):
        assert all(h.score < 0.999 for h in hits if h.id in moved)
    assert agreement(reader, queries) >= 0.95
    reader.close()
    writer.close()


def test_queries_of_the_caller_set_the_effort(tmp_path):
    """Queries that are far from all documents need more lists than documents themselves do."""
    spec = PartitionSpec("0" * 32, "space", 64, "auto", 0.98)
    far = np.random.default_rng(4).standard_normal((100, 64)).astype(np.float32)
    efforts = []
    for name, queries in (("far", far), ("near", clustered(9000, 64)[:100])):
        writer = open_writer(tmp_path / name, spec=spec, thresholds=LIMITS)
        fill(writer, clustered(9000, 64))
        assert settle(writer, queries=queries) == []
        efforts.append(max(index.effort for index in writer.state.indexes))
        writer.close()
    assert efforts[0] > efforts[1]


def test_a_template_is_trained_again_at_four_times_its_size(tmp_path):
    spec = PartitionSpec("0" * 32, "space", 64, "auto", 0.95)
    writer = open_writer(tmp_path, spec=spec, thresholds=LIMITS)
    fill(writer, clustered(4000, 64))
    fill(writer, clustered(4000, 64, seed=1), prefix="e")
    assert settle(writer) == []
    first = writer.state.templates
    assert len(first) == 1
    fill(writer, clustered(28_000, 64, seed=2), prefix="f")
    assert settle(writer) == []
    second = writer.state.templates
    assert len(second) == 1
    assert second[0].hash != first[0].hash
    assert second[0].trained_rows >= 4 * first[0].trained_rows
    assert {index.template for index in writer.state.indexes} == {second[0].hash}
    names = {p.name for p in tmp_path.glob("*.faiss")}
    assert names == writer.state.files & names
    assert len(names) == len(writer.state.indexes) + 1
    writer.close()


def test_a_merge_of_indexed_segments_reuses_their_codes(tmp_path):
    spec = PartitionSpec("0" * 32, "space", 64, "auto", 0.98)
    writer = open_writer(tmp_path, spec=spec, thresholds=LIMITS)
    vectors = clustered(8 * 2500, 64)
    for k in range(8):
        if k == 7:
            assert settle(writer) == []
            assert len(writer.state.indexes) == 7
            gone = [(f"d0-{i}", 5) for i in range(100)]
            writer.apply([shard("gone", [], gone, dimension=64)])
        ids = [f"d{k}-{i}" for i in range(2500)]
        some = vectors[k * 2500 : (k + 1) * 2500]
        data = build_shard(f"s{k}", "space", 64, ids=ids, texts=ids, vectors=some, versions=1)
        writer.apply([Shard.parse(data)])
    template = writer.state.templates[0].hash
    assert settle(writer) == []
    (index,) = writer.state.indexes
    assert index.template == template
    stored = faiss.read_index(str(tmp_path / index.file))
    rows = np.concatenate(
        [
            faiss.rev_swig_ptr(stored.invlists.get_ids(n), stored.invlists.list_size(n)).copy()
            for n in range(stored.nlist)
            if stored.invlists.list_size(n)
        ]
    )
    total = writer.state.segments[0].rows
    documents = np.flatnonzero(~writer._segments[index.segment].segment.rows.tombstones)
    assert len(rows) == len(set(rows.tolist())) == stored.ntotal
    assert set(documents.tolist()) <= set(rows.tolist()) <= set(range(total))
    reader = PartitionReader.open(tmp_path)
    assert reader.stats().indexed_documents == 8 * 2500 - 100
    assert agreement(reader, clustered(100, 64, seed=5)) >= 0.97
    reader.close()
    writer.close()


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_index_is_left_aside_and_rebuilt(tmp_path, damage):
    spec = PartitionSpec("0" * 32, "space", 64, "auto", 0.98)
    writer = open_writer(tmp_path, spec=spec, thresholds=LIMITS)
    fill(writer, clustered(9000, 64))
    assert settle(writer) == []
    writer.close()
    for path in tmp_path.glob("idx-*.faiss"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    reader = PartitionReader.open(tmp_path)
    assert reader.stats().indexed_documents == 0
    queries = clustered(20, 64, seed=5)
    assert agreement(reader, queries) == 1.0  # the scan serves
    again = open_writer(tmp_path, spec=spec, thresholds=LIMITS)
    assert settle(again) == []
    reader.refresh()
    assert reader.stats().indexed_documents > 0
    assert agreement(reader, queries) >= 0.97
    reader.close()
    again.close()


def test_an_index_that_no_file_is_left_for_is_opened_once_there_is(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(partition_reader, "INDEX_WAIT_S", 600.0)
    fill(writer, clustered(2000, DIMENSION))
    reader = PartitionReader.open(tmp_path, thresholds=SMALL)
    settle(writer)
    queries = clustered(20, DIMENSION, seed=5)
    with few_files_left(0):
        for _ in range(2):
            reader.refresh()
            assert reader.stats().indexed_documents == 0
            assert agreement(reader, queries) >= 0.97, "searches go on"
    assert not reader.refresh(), "it is not tried with every search"
    monkeypatch.setattr(reader, "_indexes_at", 0.0)
    assert reader.refresh()
    assert reader.stats().indexed_documents == 2000
    assert agreement(reader, queries) >= 0.97
    assert not reader.refresh(), "there is nothing left to do"
    reader.close()


def test_an_index_that_no_memory_is_left_for_is_read_whole_once(tmp_path, monkeypatch):
    writer = open_writer(tmp_path, thresholds=LIMITS, spec=PartitionSpec("0" * 32, "space", 64))
    fill(writer, clustered(9000, 64))
    assert settle(writer) == []
    read = []
    whole = view_builder.file_crc
    monkeypatch.setattr(view_builder, "file_crc", lambda path: read.append(path) or whole(path))

    def fail(*_):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    with monkeypatch.context() as patched:
        patched.setattr(view_builder, "DerivedIndex", fail)
        reader = PartitionReader.open(tmp_path, thresholds=LIMITS)
        for _ in range(3):
            patched.setattr(reader, "_indexes_at", 0.0)
            reader.refresh()
    assert reader.stats().indexed_documents == 0
    monkeypatch.setattr(reader, "_indexes_at", 0.0)
    reader.refresh()
    assert reader.stats().indexed_documents == 9000
    assert len(read) == 1
    reader.close()
    writer.close()


@pytest.mark.parametrize("is_damaged", [False, True], ids=["whole", "damaged"])
def test_an_index_that_had_to_wait_is_checked_like_any_other(tmp_path, monkeypatch, is_damaged):
    spec = PartitionSpec("0" * 32, "space", 64, "auto", 0.98)
    writer = open_writer(tmp_path, spec=spec, thresholds=LIMITS)
    fill(writer, clustered(9000, 64))
    assert settle(writer) == []
    (path,) = tmp_path.glob("idx-*.faiss")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= is_damaged
    path.write_bytes(data)

    def fail(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(view_builder, "file_crc", fail)
        reader = PartitionReader.open(tmp_path, thresholds=LIMITS)
        assert reader.stats().documents == 9000
    assert reader.stats().indexed_documents == 0
    monkeypatch.setattr(reader, "_indexes_at", 0.0)
    reader.refresh()
    assert reader.stats().indexed_documents == (0 if is_damaged else 9000)
    assert not reader.refresh(), "damage does not go away"
    reader.close()
    writer.close()


WAITING = Thresholds(exact_work=1000 * 384, large_work=1 << 40)
"""Past the exact range, and no segment ever gets an index."""
BIG = PartitionSpec("0" * 32, "space", 384, "auto", 0.98)


def fill_signed(writer, vectors: np.ndarray, prefix: str = "d", version: int = 1) -> None:
    """One segment, large enough to carry signs."""
    ids = [f"{prefix}{i}" for i in range(len(vectors))]
    data = build_shard(
        f"{prefix}-{version}", "space", 384, ids=ids, texts=ids, vectors=vectors, versions=version
    )
    writer.apply([Shard.parse(data)])


def test_signs_agree_with_counting_them(tmp_path):
    vectors = clustered(300, 50).astype(np.float16)
    queries = clustered(5, 50, seed=3)
    codes = sign_codes(vectors)
    assert codes.shape == (300, code_bytes(50))
    for query in queries:
        truth = ((vectors < 0) != (query < 0)).sum(axis=1)
        assert (code_distances(codes, sign_codes(query[None])[0]) == truth).all()


def test_segments_without_an_index_are_found_by_their_signs(tmp_path):
    writer = open_writer(tmp_path, spec=BIG, thresholds=WAITING)
    vectors = clustered(9000, 384)
    for part in range(3):
        fill_signed(writer, vectors[part * 3000 :][:3000], f"p{part}-")
    writer.apply([shard("small", [(f"s{i}", 1) for i in range(50)], dimension=384)])
    reader = PartitionReader.open(tmp_path, thresholds=WAITING)
    assert len(reader._present().by_signs) == 3
    queries = clustered(60, 384, seed=5)
    assert agreement(reader, queries) >= 0.98
    assert [h.id for h in reader.search(vector_of("s7", 1, 384)[None], 1)[0]] == ["s7"]
    # so many that the first pass would score most rows: all are scanned
    assert agreement(reader, queries[:3], 3000) == 1.0
    # what dies is not found any more, what takes its place is
    fill_signed(writer, clustered(3000, 384, seed=8), "p0-", version=2)
    writer.apply([shard("gone", [], [(f"p1-{i}", 2) for i in range(0, 3000, 2)], dimension=384)])
    reader.refresh()
    assert len(reader._present().by_signs) == 3  # all of p0's first segment is dead
    hits = {h.id: h.score for row in reader.search(vectors[:6000:7], 10) for h in row}
    assert all(int(i.split("-")[1]) % 2 for i in hits if i.startswith("p1-"))
    for found in reader.search(vectors[:50], 10):
        assert all(h.score < 0.999 for h in found if h.id.startswith("p0-"))
    assert agreement(reader, queries) >= 0.98
    reader.close()
    writer.close()


def test_small_collections_and_exact_policies_are_scanned(tmp_path):
    for name, policy in (("small", "auto"), ("exact", "exact")):
        spec = PartitionSpec("0" * 32, "space", 384, policy, 0.98)
        writer = open_writer(tmp_path / name, spec=spec)
        fill_signed(writer, clustered(3000, 384))
        limits = WAITING if policy == "exact" else Thresholds()
        reader = PartitionReader.open(tmp_path / name, thresholds=limits)
        assert reader._present().parts[0].segment.signs is not None
        assert not reader._present().by_signs
        assert agreement(reader, clustered(20, 384, seed=5)) == 1.0
        reader.close()
        writer.close()


def test_an_index_takes_the_place_of_the_signs_and_a_merge_writes_them_again(tmp_path):
    limits = Thresholds(exact_work=1000 * 384, large_work=2000 * 384)
    writer = open_writer(tmp_path, spec=BIG, thresholds=limits)
    for part in range(8):
        fill_signed(writer, clustered(2700, 384, seed=part), f"p{part}-")
    reader = PartitionReader.open(tmp_path, thresholds=limits)
    assert len(reader._present().by_signs) == 8
    assert settle(writer) == []
    reader.refresh()
    (part,) = reader._present().parts
    assert part.index is not None
    assert not reader._present().by_signs
    assert (part.segment.signs == sign_codes(part.segment.rows.vectors)).all()
    reader.close()
    writer.close()


def test_damaged_signs_are_left_aside_and_the_segment_serves(tmp_path):
    writer = open_writer(tmp_path, spec=BIG, thresholds=WAITING)
    fill_signed(writer, clustered(3000, 384))
    writer.close()
    (path,) = tmp_path.glob("*.seg")
    offset = Segment.open(path)._table["columns"]["signs"][0]
    data = bytearray(path.read_bytes())
    data[offset + 5] ^= 1
    path.write_bytes(data)
    reader = PartitionReader.open(tmp_path, thresholds=WAITING)
    assert reader.stats().quarantined == ()
    assert not reader._present().by_signs
    assert agreement(reader, clustered(20, 384, seed=5)) == 1.0
    reader.close()
    again = open_writer(tmp_path, spec=BIG, thresholds=WAITING)
    assert again.stats().quarantined == ()
    assert again.stats().documents == 3000
    again.close()
