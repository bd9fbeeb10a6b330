"""Pages: up to 32 documents' texts and metadata, compressed together.

Read alone, one document costs one small page; written once, a page is copied as it is through
every compaction until half of its documents are gone. Each page carries zstd's own checksum, so it
is verified whenever it is read. A **locator** says where a document lies: page << 5 | slot.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgpack
import numpy as np
import zstandard
from numpy.typing import NDArray

from vecfleet.common import limits
from vecfleet.common.errors import CorruptData

PAGE_ROWS = 32
PAGE_TEXT_BYTES = 32 << 10  # a page that reached this size takes no further document
SLOT_BITS = 5
NO_LOCATOR = 0xFFFFFFFF  # a tombstone lies in no page
MAX_PAGE_BYTES = PAGE_TEXT_BYTES + limits.MAX_TEXT_BYTES + limits.MAX_METADATA_BYTES + (4 << 10)
_LEVEL = 1

PageRow = tuple[str, bytes | None]  # text, metadata as JSON


def pack_pages(rows: Iterable[PageRow]) -> tuple[list[bytes], NDArray[np.uint32]]:
    """Compress ``rows`` into pages; returns the pages and the locator of each row."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True)
    pages: list[bytes] = []
    locators: list[int] = []
    page: list[PageRow] = []
    size = 0
    for row in rows:
        if len(page) == PAGE_ROWS or size >= PAGE_TEXT_BYTES:
            pages.append(compressor.compress(msgpack.packb(page)))
            page, size = [], 0
        locators.append(len(pages) << SLOT_BITS | len(page))
        page.append(row)
        size += len(row[0])
    if page:
        pages.append(compressor.compress(msgpack.packb(page)))
    return pages, np.array(locators, np.uint32)


def read_page(page: bytes | memoryview) -> list[PageRow]:
    """The rows of one page; raises ``CorruptData`` when it is damaged."""
    try:
        if not 0 < zstandard.frame_content_size(page) <= MAX_PAGE_BYTES * 4:
            raise CorruptData("a page of texts has an impossible size")
        rows = msgpack.unpackb(zstandard.ZstdDecompressor().decompress(page))
        return [(str(text), metadata) for text, metadata in rows]
    except (zstandard.ZstdError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise CorruptData(f"a page of texts cannot be read: {error}") from error


def offsets_of(
    pieces: Sequence[bytes], dtype: type[np.unsignedinteger]
) -> NDArray[np.unsignedinteger]:
    """Where each piece begins when all are joined, and the end, as (len(pieces) + 1,)."""
    offsets = np.zeros(len(pieces) + 1, dtype)
    np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
    return offsets
