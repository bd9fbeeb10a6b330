"""The wire form of one block's vectors on their way to the index.

header (64 bytes) | vectors | keys | contents | versions | id offsets | locators | page offsets |
tombstones | ids | pages | shard id | space, little-endian, each column on a multiple of 8. The
checksum covers everything behind it; lengths are checked against each other before any is used.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vecfleet.common import limits
from vecfleet.common.errors import CorruptData, CorruptShard, InvalidVector
from vecfleet.worker.digest import content_keys, id_keys
from vecfleet.worker.page import NO_LOCATOR, SLOT_BITS, offsets_of, pack_pages, read_page
from vecfleet.worker.rows import Rows
from vecfleet.worker.unit_length import not_of_length_1

MAGIC = b"VFSHARD1"
MAX_ROWS = 1 << 16
MAX_DIMENSION = 1 << 14
_HEADER = struct.Struct("<8sIIIIIIII24x")  # magic, crc, rows, dimension, pages, 4 lengths
_CHECKED_FROM = 12
_ALIGN = 8
_F16_MAGNITUDE = np.uint16(0x7FFF)
_F16_MAX_OF_UNIT = 0x3C10  # 1.0 and a little rounding; NaN and infinity lie above


@dataclass(frozen=True, slots=True)
class Shard:
    """One block's rows with the job they come from and the space of their vectors."""

    shard_id: str
    space: str
    dimension: int
    rows: Rows
    nbytes: int

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def parse(cls, data: bytes | memoryview) -> Shard:
        """Views of the columns in ``data``, which stays referenced; nothing is copied.

        Raises ``CorruptShard`` when the bytes do not match their checksum or each other.
        """
        view = memoryview(data)
        if len(view) < _HEADER.size:
            raise CorruptShard(f"a shard has {len(view)} bytes, less than its header")
        magic, crc, n, dimension, pages, *lengths = _HEADER.unpack_from(view)
        if magic != MAGIC:
            raise CorruptShard("these bytes are no shard of a known version")
        if zlib.crc32(view[_CHECKED_FROM:]) != crc:
            raise CorruptShard("a shard does not match its checksum")
        if not 0 < n <= MAX_ROWS or not 0 < dimension <= MAX_DIMENSION or pages > n:
            raise CorruptShard(f"a shard claims {n} rows of {dimension} dimensions, {pages} pages")
        sizes = _column_sizes(n, dimension, pages, *lengths)
        if _HEADER.size + sum(_padded(size) for size in sizes) != len(view):
            raise CorruptShard("a shard's length does not match its header")
        columns = []
        position = _HEADER.size
        for size in sizes:
            columns.append(np.frombuffer(view, np.uint8, size, position))
            position += _padded(size)
        rows = _rows(columns, n, dimension, pages)
        shard_id, space = (_decode(column) for column in columns[-2:])
        _check_rows(rows)
        return cls(shard_id, space, dimension, rows, len(view))

    def check_pages(self) -> None:
        """Read every page once: 0.1 to 0.4 ms for a block.

        Raises ``CorruptShard`` where one cannot be read, or does not hold a row that lies in it. In
        the index it would fail each search that finds it, and each merge of its segment.
        """
        places = self.rows.locators[~self.rows.tombstones]
        last = np.zeros(self.rows.page_count, np.int64)
        np.maximum.at(last, places >> SLOT_BITS, places & ((1 << SLOT_BITS) - 1))
        for number, slot in enumerate(last.tolist()):
            try:
                held = len(read_page(self.rows.page(number)))
            except CorruptData as error:
                raise CorruptShard(f"a shard's texts cannot be read: {error}") from error
            if slot >= held:
                raise CorruptShard(f"a page of {held} texts has none at place {slot}")


def build_shard(
    shard_id: str,
    space: str,
    dimension: int,
    *,
    ids: Sequence[str] = (),
    texts: Sequence[str] = (),
    vectors: NDArray[np.floating] | None = None,
    versions: ArrayLike = (),
    metadata: Sequence[bytes | None] | None = None,
    deleted_ids: Sequence[str] = (),
    deleted_versions: ArrayLike = (),
) -> bytes:
    """One block's shard: documents (id, text, vector, version, metadata as JSON) and deletions.

    ``vectors`` is (len(ids), dimension), L2-normalised. ``versions`` and ``deleted_versions`` are
    one number for all rows or one a row. Raises ``InvalidVector`` for a wrong shape, NaN, infinity
    or a vector that is not normalised, ``ValueError`` when columns differ in length.
    """
    n, gone = len(ids), len(deleted_ids)
    if not 0 < n + gone <= MAX_ROWS or len(texts) != n:
        raise ValueError(f"{n} ids, {len(texts)} texts and {gone} deletions make no shard")
    half = np.zeros((n + gone, dimension), "<f2")
    if n:
        half[:n] = _checked_vectors(vectors, n, dimension)
    all_versions = np.empty(n + gone, "<i8")
    all_versions[:n] = versions if n else 0
    all_versions[n:] = deleted_versions if gone else 0
    contents = np.zeros(n + gone, "<u8")
    contents[:n] = content_keys(texts, metadata)
    pages, locators = pack_pages(zip(texts, metadata or [None] * n, strict=True))
    all_ids = [*ids, *deleted_ids]
    encoded = [i.encode() for i in all_ids]
    tombstones = np.zeros(n + gone, np.uint8)
    tombstones[n:] = 1
    page_column = b"".join(pages)
    id_column = b"".join(encoded)
    names = [shard_id.encode(), space.encode()]
    columns: list[bytes | NDArray[np.generic]] = [
        half,
        id_keys(all_ids),
        contents,
        all_versions,
        offsets_of(encoded, np.uint32),
        np.concatenate([locators, np.full(gone, NO_LOCATOR, np.uint32)]),
        offsets_of(pages, np.uint32),
        tombstones,
        id_column,
        page_column,
        *names,
    ]
    lengths = (len(id_column), len(page_column), len(names[0]), len(names[1]))
    return _sealed(columns, (n + gone, dimension, len(pages), *lengths))


def _sealed(columns: Sequence[bytes | NDArray[np.generic]], counts: tuple[int, ...]) -> bytes:
    pieces: list[bytes | memoryview] = [b""]
    for column in columns:
        raw = column.data.cast("B") if isinstance(column, np.ndarray) else column
        pieces += [raw, bytes(-len(raw) % _ALIGN)]
    header = _HEADER.pack(MAGIC, 0, *counts)
    pieces[0] = header
    data = bytearray().join(pieces)
    struct.pack_into("<I", data, 8, zlib.crc32(memoryview(data)[_CHECKED_FROM:]))
    return bytes(data)


def _checked_vectors(
    vectors: NDArray[np.floating] | None, n: int, dimension: int
) -> NDArray[np.floating]:
    if vectors is None or vectors.shape != (n, dimension):
        shape = None if vectors is None else vectors.shape
        raise InvalidVector(f"vectors have the shape {shape}, not {(n, dimension)}")
    if places := not_of_length_1(vectors):
        raise InvalidVector(f"vector {places[0]} is not a finite vector of length 1")
    return vectors


def _column_sizes(
    n: int, dimension: int, pages: int, ids: int, page_bytes: int, shard_id: int, space: int
) -> list[int]:
    fixed = [n * dimension * 2, n * 16, n * 8, n * 8, (n + 1) * 4, n * 4, (pages + 1) * 4, n]
    return [*fixed, ids, page_bytes, shard_id, space]


def _padded(size: int) -> int:
    return size + -size % _ALIGN


def _rows(columns: Sequence[NDArray[np.uint8]], n: int, dimension: int, pages: int) -> Rows:
    locators = columns[5].view("<u4")
    places = locators[locators != NO_LOCATOR] >> SLOT_BITS
    if len(places) and places.max() >= pages:
        raise CorruptShard("a shard's locators are not valid")
    return Rows(
        vectors=columns[0].view("<f2").reshape(n, dimension),
        keys=columns[1].view("<u8").reshape(n, 2),
        contents=columns[2].view("<u8"),
        versions=columns[3].view("<i8"),
        id_offsets=columns[4].view("<u4").astype(np.uint64),
        locators=locators,
        page_offsets=columns[6].view("<u4").astype(np.uint64),
        page_rows=np.bincount(places, minlength=pages).astype(np.uint8),
        tombstones=columns[7].view(np.bool_),
        ids=columns[8],
        pages=columns[9],
    )


def _decode(column: NDArray[np.uint8]) -> str:
    try:
        return column.tobytes().decode()
    except UnicodeDecodeError as error:
        raise CorruptShard("a shard's name is not valid UTF-8") from error


def _check_rows(rows: Rows) -> None:
    """Raise ``CorruptShard`` unless the columns agree with each other."""
    id_lengths = np.diff(rows.id_offsets.astype(np.int64))
    magnitudes = (rows.vectors.view(np.uint16) & _F16_MAGNITUDE).max(axis=1)
    tombstones = rows.tombstones
    unit = (magnitudes > 0) & (magnitudes <= _F16_MAX_OF_UNIT)
    checks = {
        "tombstone flags": tombstones.view(np.uint8).max() <= 1,
        "id offsets": _spans(rows.id_offsets, len(rows.ids))
        and id_lengths.min() > 0
        and id_lengths.max() <= limits.MAX_ID_BYTES,
        "page offsets": _spans(rows.page_offsets, len(rows.pages)),
        "locators": ((rows.locators == NO_LOCATOR) == tombstones).all(),
        "versions": rows.versions.min() >= 0,
        "vectors": (unit == ~tombstones).all() and not magnitudes[tombstones].any(),
    }
    wrong = [name for name, good in checks.items() if not good]
    if wrong:
        raise CorruptShard(f"a shard's {', '.join(wrong)} are not valid")


def _spans(offsets: NDArray[np.uint64], total: int) -> bool:
    return bool(offsets[0] == 0 and offsets[-1] == total and (offsets[1:] >= offsets[:-1]).all())
