import numpy as np
import pytest
from index_oracle import shard, text_of

from vecfleet.common.errors import CorruptSegment, Unavailable
from vecfleet.worker.digest import id_keys
from vecfleet.worker.segment import HEADER_BYTES, Segment, joined, write_segment

FIRST = [(f"a{i}", i + 1) for i in range(50)]
SECOND = [(f"b{i}", i + 1) for i in range(40)]
DELETES = [("gone", 5)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "seg-1.seg"
    parts = [shard("1", FIRST).rows, shard("2", SECOND, DELETES).rows]
    info = write_segment(path, 16, joined(parts))
    assert (info.rows, info.nbytes) == (91, path.stat().st_size)
    return path


def test_rows_of_several_shards_become_one_segment(path):
    segment = Segment.open(path)
    documents = FIRST + SECOND + DELETES
    assert len(segment) == 91
    for row, (document, version) in enumerate(documents):
        assert segment.rows.id(row) == document
        assert segment.rows.versions[row] == version
        if document != "gone":
            assert segment.read(row)[0] == text_of(document, version)
    assert segment.rows.tombstones.sum() == 1
    parts = np.concatenate([shard("1", FIRST).rows.vectors, shard("2", SECOND).rows.vectors])
    assert (segment.rows.vectors[:90] == parts).all()
    segment.verify()


def test_find_gives_the_living_row_or_none(path):
    segment = Segment.open(path)
    alive = np.ones(91, np.bool_)
    alive[3] = False
    rows = segment.find(id_keys(["b1", "nobody", "a0", "a3", "gone"]), alive)
    assert rows.tolist() == [51, -1, 0, -1, 90]
    assert segment.find(id_keys([]), alive).tolist() == []


def test_find_tells_ids_apart_that_share_64_bits(tmp_path):
    """64 bits can be made to collide; 128 bits are compared."""
    part = shard("1", FIRST).rows
    keys = part.keys.copy()
    keys[:, 0] = 7
    columns = {**joined([part]), "keys": [keys]}
    write_segment(tmp_path / "s", 16, columns)
    segment = Segment.open(tmp_path / "s")
    alive = np.ones(50, np.bool_)
    assert segment.find(keys, alive).tolist() == list(range(50))
    alive[::2] = False
    assert segment.find(keys, alive)[::2].tolist() == [-1] * 25
    missing = np.array([[7, 1], [8, 1]], np.uint64)
    assert segment.find(missing, alive).tolist() == [-1, -1]


def test_a_segment_that_was_unlinked_stays_readable(path):
    segment = Segment.open(path)
    path.unlink()
    assert segment.read(0)[0] == text_of("a0", 1)


def test_every_flipped_byte_is_noticed_before_it_matters(path):
    data = path.read_bytes()
    whole = Segment.open(path)
    start, length, _ = whole._table["columns"]["pages"]
    pages = range(start, start + length)
    texts = [whole.read(row) for row in range(90)]
    noticed = 0
    covered = {
        place
        for offset, size, _ in whole._table["columns"].values()
        for place in range(offset, offset + size)
    }
    for place in [*range(200), *range(HEADER_BYTES, len(data), 5)]:
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        if place in pages:
            segment = Segment.open(path)
            with pytest.raises(CorruptSegment):
                segment.verify()
            try:  # zstd ignores a few bits of its header; the texts are right then
                assert [segment.read(row) for row in range(90)] == texts
            except CorruptSegment as error:
                assert "seg-1.seg" in error.message
                noticed += 1
        elif place in covered or place < 16:
            with pytest.raises(CorruptSegment):
                Segment.open(path)
    assert noticed > len(pages) // 5 - 20


@pytest.mark.parametrize("length", [0, 10, HEADER_BYTES, -1, -500])
def test_a_cut_file_is_noticed(path, length):
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CorruptSegment):
        Segment.open(path)


def test_a_header_of_zeros_behind_the_magic_is_noticed(path):
    """The length and the checksum of nothing are zeros too."""
    data = bytearray(path.read_bytes())
    data[8:520] = bytes(512)
    path.write_bytes(data)
    with pytest.raises(CorruptSegment):
        Segment.open(path)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def lost():
        raise OSError(28, "No space left on device")
        yield

    columns = {**joined([shard("1", FIRST).rows]), "ids": lost()}
    with pytest.raises(Unavailable, match="No space left"):
        write_segment(tmp_path / "s", 16, columns)
    assert list(tmp_path.iterdir()) == []


def test_a_released_segment_can_still_be_read(tmp_path):
    rows = shard("s", [(f"d{i}", 1) for i in range(100)]).rows
    write_segment(tmp_path / "s", 16, joined([rows]))
    segment = Segment.open(tmp_path / "s")
    before = segment.rows.vectors.copy()
    segment.release()
    assert (segment.rows.vectors == before).all()
    assert segment.read(7)[0] == text_of("d7", 1)
    segment.verify()
