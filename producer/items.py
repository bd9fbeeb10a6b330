"""What a stream of input holds: documents with where they stand, and lines that are none."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from vecfleet.common.document import Document
from vecfleet.common.errors import VecfleetError

MAX_EXCERPT_CHARACTERS = 200


class Sourced(NamedTuple):
    """A document and where it was read."""

    document: Document
    file: str
    line: int  # from 1; for Parquet the row, for one file a document 1


@dataclass(frozen=True, slots=True)
class Rejected:
    """A line, or a document, that did not get into the collection, and why."""

    file: str  # "" where the documents do not come from files
    line: int  # from 1; the place in the stream where there is no file
    code: str  # of vecfleet.common.errors
    message: str
    raw: str = ""  # the beginning of what stood there
    id: str | None = None  # where the document had a readable one

    def to_wire(self) -> dict[str, Any]:
        """As one line of a rejects file; what is not known is left out."""
        return {name: value for name, value in asdict(self).items() if value not in ("", None)}


def reject(
    error: VecfleetError, file: str, line: int, raw: bytes | str = "", id: str | None = None
) -> Rejected:
    """The rejection that ``error`` gives reason for; ``raw`` is cut to an excerpt."""
    if isinstance(raw, bytes):
        raw = raw[: 4 * MAX_EXCERPT_CHARACTERS].decode(errors="backslashreplace")
    excerpt = raw[:MAX_EXCERPT_CHARACTERS].encode(errors="backslashreplace").decode()
    return Rejected(file, line, error.code, error.message, excerpt, id)
