import random
import struct
import zlib

import numpy as np
import pytest
from index_oracle import DIMENSION, metadata_of, shard_bytes, text_of, vector_of

from vecfleet.common.errors import CorruptShard, InvalidVector
from vecfleet.worker.digest import content_keys, id_keys
from vecfleet.worker.page import NO_LOCATOR, read_page
from vecfleet.worker.shard import Shard, build_shard

DOCUMENTS = [(f"doc-{i}-ü", i) for i in range(70)]
DELETES = [("gone", 9), ("doc-3-ü", 9)]


def unit(n: int, d: int = DIMENSION) -> np.ndarray:
    vectors = np.random.default_rng(1).standard_normal((n, d)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_a_shard_comes_back_as_it_was_built():
    shard = Shard.parse(shard_bytes("job-1", DOCUMENTS, DELETES))
    rows = shard.rows
    assert (shard.shard_id, shard.space, shard.dimension, len(shard)) == ("job-1", "space", 16, 72)
    ids = [d for d, _ in DOCUMENTS + DELETES]
    assert [rows.id(i) for i in range(72)] == ids
    assert (rows.keys == id_keys(ids)).all()
    assert rows.versions.tolist() == [v for _, v in DOCUMENTS + DELETES]
    assert rows.tombstones.tolist() == [False] * 70 + [True] * 2
    assert (rows.locators[70:] == NO_LOCATOR).all()
    assert not rows.vectors[70:].any()
    wanted = np.array([vector_of(*d) for d in DOCUMENTS])
    assert np.allclose(rows.vectors[:70].astype(np.float32), wanted, atol=1e-3)
    texts = [text_of(*d) for d in DOCUMENTS]
    metadata = [metadata_of(*d) for d in DOCUMENTS]
    assert (rows.contents[:70] == content_keys(texts, metadata)).all()
    assert rows.page_count == 3
    read = [read_page(rows.page(int(at) >> 5))[at & 31] for at in rows.locators[:70].tolist()]
    assert read == list(zip(texts, metadata, strict=True))


def test_a_shard_may_hold_deletions_only():
    shard = Shard.parse(shard_bytes("job-1", [], DELETES))
    assert shard.rows.tombstones.all()
    assert shard.rows.page_count == 0


def test_parse_does_not_copy_the_vectors():
    data = shard_bytes("job-1", DOCUMENTS)
    assert np.shares_memory(Shard.parse(data).rows.vectors, np.frombuffer(data, np.uint8))


def test_long_texts_get_pages_of_their_own():
    text = "x" * (200 << 10)
    shard = Shard.parse(
        build_shard("j", "s", 16, ids=list("abc"), texts=[text] * 3, vectors=unit(3), versions=1)
    )
    assert shard.rows.page_count == 3
    assert read_page(shard.rows.page(1)) == [(text, None)]


@pytest.mark.parametrize(
    "vectors",
    [
        None,
        unit(3),
        unit(2, 8),
        np.zeros((2, 16), np.float32),
        np.full((2, 16), np.nan, np.float32),
        np.full((2, 16), np.inf, np.float32),
        unit(2) * 2,
    ],
    ids=["none", "count", "dimension", "zero", "nan", "inf", "length"],
)
def test_vectors_that_are_not_unit_vectors_are_refused(vectors):
    with pytest.raises(InvalidVector):
        build_shard("j", "s", 16, ids=["a", "b"], texts=["x", "y"], vectors=vectors, versions=1)


def test_columns_of_different_length_are_refused():
    with pytest.raises(ValueError, match="make no shard"):
        build_shard("j", "s", 16, ids=["a", "b"], texts=["x"], vectors=unit(2), versions=1)
    with pytest.raises(ValueError, match="make no shard"):
        build_shard("j", "s", 16)


def test_every_flipped_byte_and_every_cut_is_noticed():
    data = shard_bytes("job-1", DOCUMENTS[:8], DELETES)
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(CorruptShard):
            Shard.parse(bytes(damaged))
    for length in range(0, len(data), 7):
        with pytest.raises(CorruptShard):
            Shard.parse(data[:length])
    with pytest.raises(CorruptShard):
        Shard.parse(data + b"\0" * 8)


def test_lies_under_a_good_checksum_are_noticed():
    """A shard that was sealed wrong on purpose never makes the reader look outside of it."""
    data = shard_bytes("job-1", DOCUMENTS[:8], DELETES)
    generator = random.Random(5)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(data)
        # the header's counts, and everything behind the vectors and keys
        place = generator.choice([*range(12, 40), *range(64 + 10 * (32 + 16), len(data))])
        damaged[place] = generator.randrange(256)
        struct.pack_into("<I", damaged, 8, zlib.crc32(memoryview(damaged)[12:]))
        try:
            shard = Shard.parse(bytes(damaged))
        except CorruptShard:
            refused += 1
            continue
        rows = shard.rows
        for row in range(len(rows)):
            assert rows.id(row)
            if not rows.tombstones[row]:
                assert int(rows.locators[row]) >> 5 < rows.page_count
    assert refused > 300


def resealed(data: bytes, old: bytes, new: bytes) -> Shard:
    """The shard with other bytes, under a checksum that is right."""
    assert data.count(old) == 1 and len(old) == len(new)
    made = bytearray(data.replace(old, new))
    struct.pack_into("<I", made, 8, zlib.crc32(memoryview(made)[12:]))
    return Shard.parse(bytes(made))


def test_pages_that_cannot_be_read_are_refused_before_they_reach_the_index():
    data = shard_bytes("job-1", DOCUMENTS, DELETES)
    rows = Shard.parse(data).rows
    Shard.parse(data).check_pages()
    Shard.parse(shard_bytes("job-1", [], DELETES)).check_pages()
    page = rows.page(1)
    broken = resealed(data, page, page[:-1] + bytes([page[-1] ^ 1]))
    with pytest.raises(CorruptShard, match="cannot be read"):
        broken.check_pages()
    locators = rows.locators.copy()
    assert (locators[69] >> 5, locators[69] & 31) == (2, 5)  # the last page holds six
    locators[69] += 1
    misplaced = resealed(data, rows.locators.tobytes(), locators.tobytes())
    with pytest.raises(CorruptShard, match="a page of 6 texts has none at place 6"):
        misplaced.check_pages()


def test_a_changed_text_or_metadata_changes_the_content_key():
    keys = content_keys(["a", "a", "a", "b"], [None, b'{"x":1}', b'{"x":2}', None])
    assert len(set(keys.tolist())) == 4
    assert content_keys(["a"])[0] == keys[0]
