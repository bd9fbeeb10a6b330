"""A segment: an immutable file of rows, mapped into memory, never read whole.

4 KiB header (magic, length, checksum, msgpack table of columns) | vectors | the other columns, each
on a multiple of 64 bytes with a checksum of its own. Beside the columns of ``Rows`` a segment keeps
its keys' first words sorted, with the row of each, so that looking an id up touches mapped pages
only, and a filter that tells of most keys at once that they are not there. From ``SIGNS_WORK``
numbers on the vectors' signs follow (signs.py); they are derived, so it serves without them too.

**Checked when opened:** header, sizes and every column but the pages of text, which carry a
checksum each and are verified whenever they are read. CRC-32 runs at about 4 GB/s, so this costs
0.2 s for a million documents of 384 dimensions.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from vecfleet.common.errors import CorruptData, CorruptSegment, Unavailable
from vecfleet.worker.durable import CrashPoint, no_crash, publish, write_all
from vecfleet.worker.index_policy import SIGNS_WORK
from vecfleet.worker.page import SLOT_BITS, PageRow, read_page
from vecfleet.worker.rows import Mask, RowNumbers, Rows, shifted_locators
from vecfleet.worker.segment_check import rows_fault, table_fault
from vecfleet.worker.signs import Codes, code_bytes, sign_codes

MAGIC = b"VFSEGM01"
HEADER_BYTES = 4096
ALIGN_BYTES = 64
SCRATCH_BYTES = 128  # the header's end stays free: a reader of vectors may write there, privately
LARGE_BYTES = 1 << 20  # what was written larger is not verified again by readers that run
RELEASED_BYTES = 4 << 20  # unmapped at once: 0.2 ms
RELEASE_PAUSE_S = 0.001
_HEADER = struct.Struct("<8sII")  # magic, length of the table, its checksum
_DTYPES: dict[str, Any] = {
    "vectors": "<f2",
    "keys": "<u8",
    "contents": "<u8",
    "versions": "<i8",
    "tombstones": "|b1",
    "id_offsets": "<u8",
    "ids": "|u1",
    "locators": "<u4",
    "page_offsets": "<u8",
    "page_rows": "|u1",
    "pages": "|u1",
    "sorted_keys": "<u8",
    "order": "<u4",
    "filter": "|b1",  # whether a key begins with these bits; 8 to 16 places a row
}
_WIDTHS = {name: np.dtype(dtype).itemsize for name, dtype in _DTYPES.items()}
FILTER_PLACES_PER_ROW = 8
SIGNS = "signs"  # the optional column, rows x code_bytes; last in the file
_PIECE_ROWS = 4096


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """What the writer of a segment tells the manifest."""

    file: str
    rows: int
    nbytes: int


class Segment:
    """One mapped segment. Unlinking the file does not disturb a segment that is open."""

    def __init__(self, path: Path, buffer: mmap.mmap, table: dict[str, Any]) -> None:
        """Use ``open``."""
        self.path = path
        self.nbytes = len(buffer)
        self.buffer = buffer
        self._table = table
        columns = {name: self._column(name) for name in _DTYPES}
        self.sorted_keys: NDArray[np.uint64] = columns.pop("sorted_keys")
        self.order: NDArray[np.uint32] = columns.pop("order")
        self._filter: Mask = columns.pop("filter")
        self._filter_shift = np.uint64(64 - (len(self._filter).bit_length() - 1))
        columns["vectors"] = columns["vectors"].reshape(table["rows"], table["dimension"])
        columns["keys"] = columns["keys"].reshape(table["rows"], 2)
        self.rows = Rows(**columns)
        self.signs: Codes | None = None  # none when it is small, or the column is damaged
        if SIGNS in table["columns"]:
            self.signs = self._column(SIGNS).reshape(table["rows"], code_bytes(table["dimension"]))

    @classmethod
    def open(cls, path: Path, *, just_written: bool = False, own: bool = False) -> Segment:
        """Map ``path`` and check it; raises ``CorruptSegment`` naming it, ``FileNotFoundError``.

        Raises ``Unavailable`` where the system has no file or no memory left for it.
        Of a large segment that was ``just_written`` only the header is checked: the process that
        merged it has verified the file moments ago, and searches should not wait. ``own``: the
        same for a file of any size that this process has just written.
        """
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < HEADER_BYTES:
                    raise CorruptSegment(f"{path.name} has only {size} bytes")
                # A private mapping: faiss wants a header of its own before the vectors (ann.py).
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise Unavailable(f"{path.name} cannot be opened: {error.strerror}") from error
        segment = cls(path, buffer, _read_table(path, buffer))
        if not own and not (just_written and size > LARGE_BYTES):
            segment._verify({"pages"})
            segment._check_rows()
        return segment

    def __len__(self) -> int:
        return len(self.rows)

    def release(self) -> None:
        """Give the pages back, a few at a time, while other threads go on.

        Unmapping a large segment whole would hold them up for many milliseconds. Whoever still
        reads the segment has its pages mapped again.
        """
        for start in range(0, self.nbytes, RELEASED_BYTES):
            length = min(RELEASED_BYTES, self.nbytes - start)
            self.buffer.madvise(mmap.MADV_DONTNEED, start, length)
            time.sleep(RELEASE_PAUSE_S)  # the call above holds the interpreter's lock

    def verify(self) -> None:
        """Check every byte, the pages too; raises ``CorruptSegment``."""
        self._verify(set())

    def find(self, keys: NDArray[np.uint64], alive: Mask) -> RowNumbers:
        """The living row of each key of ``keys`` (n, 2), or -1.

        Fast when the keys are sorted by their first word.
        """
        found = np.full(len(keys), -1, np.int64)
        first = np.ascontiguousarray(keys[:, 0])
        hits = np.flatnonzero(self._filter[first >> self._filter_shift])
        places = np.searchsorted(self.sorted_keys, first[hits])
        inside = places < len(self)
        hits, places = hits[inside], places[inside]
        same = self.sorted_keys[places] == first[hits]
        hits, places = hits[same], places[same]
        while len(hits):  # a second turn only for keys that share 64 bits, or one id twice
            rows = self.order[places].astype(np.int64)
            match = (self.rows.keys[rows, 1] == keys[hits, 1]) & alive[rows]
            found[hits[match]] = rows[match]
            places, hits = places[~match] + 1, hits[~match]
            more = places < len(self)
            places, hits = places[more], hits[more]
            same = self.sorted_keys[places] == first[hits]
            places, hits = places[same], hits[same]
        return found

    def read(self, row: int) -> PageRow:
        """Text and metadata of one row that is no tombstone; raises ``CorruptSegment``."""
        locator = int(self.rows.locators[row])
        page = self.rows.page(locator >> SLOT_BITS)
        try:
            return read_page(page)[locator & ((1 << SLOT_BITS) - 1)]
        except (CorruptData, IndexError) as error:
            raise CorruptSegment(f"{self.path.name}: {error}") from error

    def _column(self, name: str) -> Any:
        offset, length, _ = self._table["columns"][name]
        dtype = np.dtype(_DTYPES.get(name, "|u1"))
        return np.frombuffer(self.buffer, dtype, length // dtype.itemsize, offset)

    def _check_rows(self) -> None:
        if fault := rows_fault(self.rows, self.sorted_keys, self.order, self._filter):
            raise CorruptSegment(f"the {fault} of {self.path.name} do not fit together")

    def _verify(self, skipped: set[str]) -> None:
        view = memoryview(self.buffer)
        for name, (offset, length, crc) in self._table["columns"].items():
            if name in skipped or zlib.crc32(view[offset : offset + length]) == crc:
                continue
            if name == SIGNS:
                self.signs = None  # the vectors tell the same; the next merge writes them again
            else:
                raise CorruptSegment(f"the {name} of {self.path.name} do not match their checksum")


def write_segment(
    path: Path,
    dimension: int,
    columns: Mapping[str, Iterable[NDArray[Any]]],
    crash: CrashPoint = no_crash,
) -> SegmentInfo:
    """Publish a segment of the columns of ``Rows``, each given in pieces, which may be lazy.

    Raises ``Unavailable`` when the file cannot be written; nothing is left behind then.
    """
    keys = [np.ascontiguousarray(piece) for piece in columns["keys"]]
    first = np.concatenate([piece.reshape(-1, 2)[:, 0] for piece in keys])
    order = np.argsort(first).astype(np.uint32)
    pieces = {
        **columns,
        "keys": keys,
        "sorted_keys": [first[order]],
        "order": [order],
        "filter": [_key_filter(first)],
    }

    def write(handle: int) -> None:
        table: dict[str, list[int]] = {}
        position = HEADER_BYTES
        os.lseek(handle, position, os.SEEK_SET)
        columns = dict(pieces)
        if len(first) * dimension >= SIGNS_WORK:
            columns[SIGNS] = _signs(handle, len(first), dimension)
        for name in (*_DTYPES, *columns.keys() - _DTYPES.keys()):
            crc, length = 0, 0
            for piece in columns[name]:
                raw = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
                crc = zlib.crc32(raw, crc)
                length += len(raw)
                write_all(handle, raw)
            table[name] = [position, length, crc]
            padding = -length % ALIGN_BYTES
            write_all(handle, memoryview(bytes(padding)))
            position += length + padding
        os.pwrite(handle, _header(len(first), dimension, table, position), 0)

    publish(path, write, crash)
    return SegmentInfo(path.name, len(first), path.stat().st_size)


def joined(parts: Sequence[Rows]) -> dict[str, Iterable[NDArray[Any]]]:
    """The columns of several ``Rows`` one after the other, without a copy of the large ones."""
    pages_before = np.cumsum([0, *(part.page_count for part in parts)]).tolist()
    return {
        "vectors": (part.vectors for part in parts),
        "keys": [part.keys for part in parts],
        "contents": (part.contents for part in parts),
        "versions": (part.versions for part in parts),
        "tombstones": (part.tombstones for part in parts),
        "id_offsets": _joined_offsets([part.id_offsets for part in parts]),
        "ids": (part.ids for part in parts),
        "locators": (
            shifted_locators(part.locators, before)
            for part, before in zip(parts, pages_before, strict=False)
        ),
        "page_offsets": _joined_offsets([part.page_offsets for part in parts]),
        "page_rows": (part.page_rows for part in parts),
        "pages": (part.pages for part in parts),
    }


def _signs(handle: int, rows: int, dimension: int) -> Iterator[Codes]:
    """The signs of the vectors that were just written: they may have been lazy."""
    width = 2 * dimension
    for start in range(0, rows, _PIECE_ROWS):
        length = min(_PIECE_ROWS, rows - start) * width
        raw = os.pread(handle, length, HEADER_BYTES + start * width)
        yield sign_codes(np.frombuffer(raw, "<f2").reshape(-1, dimension))


def _key_filter(first: NDArray[np.uint64]) -> Mask:
    bits = (FILTER_PLACES_PER_ROW * len(first) - 1).bit_length()
    places: Mask = np.zeros(1 << bits, np.bool_)
    places[first >> np.uint64(64 - bits)] = True
    return places


def _joined_offsets(offsets: Sequence[NDArray[np.uint64]]) -> Iterator[NDArray[np.uint64]]:
    base = np.uint64(0)
    yield np.zeros(1, np.uint64)
    for own in offsets:
        yield own[1:] + base
        base += own[-1]


def _header(rows: int, dimension: int, columns: dict[str, list[int]], size: int) -> bytes:
    table: bytes = msgpack.packb(
        {"rows": rows, "dimension": dimension, "size": size, "columns": columns}
    )
    if len(table) > HEADER_BYTES - SCRATCH_BYTES - _HEADER.size:
        raise ValueError("the table of columns does not fit into the header")
    return _HEADER.pack(MAGIC, len(table), zlib.crc32(table)) + table


def _read_table(path: Path, buffer: mmap.mmap) -> dict[str, Any]:
    magic, length, crc = _HEADER.unpack_from(buffer)
    raw = buffer[_HEADER.size : _HEADER.size + length]
    # Of nothing at all the checksum is 0: a header of zeros would pass.
    if magic != MAGIC or not 0 < length <= HEADER_BYTES or zlib.crc32(raw) != crc:
        raise CorruptSegment(f"the header of {path.name} is damaged")
    try:
        table: Any = msgpack.unpackb(raw)
    except (ValueError, msgpack.UnpackException) as error:
        raise CorruptSegment(f"the header of {path.name} cannot be read: {error}") from error
    if fault := table_fault(table, len(buffer), _WIDTHS, SIGNS, HEADER_BYTES, ALIGN_BYTES):
        raise CorruptSegment(f"{fault} in {path.name} cannot be right")
    if table.get("size") != len(buffer):
        raise CorruptSegment(f"{path.name} has {len(buffer)} bytes, not what its header says")
    told: dict[str, Any] = table
    return told
