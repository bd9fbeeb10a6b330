"""A document as both doors accept it, and the block of documents that one job carries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vecfleet.common import limits
from vecfleet.common.errors import (
    EmptyText,
    EngineFailed,
    InvalidInput,
    TextsTooLong,
    TextTooLong,
    TooManyItems,
    UnknownField,
)
from vecfleet.common.metadata import encode_metadata

_FIELDS = frozenset(("id", "text", "metadata", "version"))
_MAX_VERSION = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Document:
    """One document; build it with ``parse_document``, which checks it."""

    id: str
    text: str
    metadata: bytes | None = None  # a JSON object, encoded
    version: int | None = None
    size: int = 0  # bytes of id, text and metadata


def check_text(text: object, field_name: str = "text") -> int:
    """Check one text and return its length in bytes.

    Raises ``EmptyText``, ``TextTooLong`` or ``InvalidInput``, naming ``field_name``.
    """
    if not isinstance(text, str):
        raise InvalidInput(f"{field_name} must be a string", field=field_name)
    if not text or text.isspace():
        raise EmptyText(field=field_name)
    size = _utf8_length(text, field_name)
    if size > limits.MAX_TEXT_BYTES:
        raise TextTooLong(
            f"{field_name} has {size} bytes; at most {limits.MAX_TEXT_BYTES} are accepted",
            field=field_name,
        )
    return size


def check_texts(
    texts: Sequence[object], field_name: str, max_items: int = limits.MAX_INPUTS
) -> int:
    """Check all texts of a request and return their length in bytes together."""
    if not texts:
        raise InvalidInput(f"{field_name} must not be empty", field=field_name)
    if len(texts) > max_items:
        raise TooManyItems(
            f"{field_name} has {len(texts)} items; at most {max_items} are accepted",
            field=field_name,
        )
    return sum(check_text(text, f"{field_name}[{i}]") for i, text in enumerate(texts))


def check_tokens(
    size: int, texts: int, field_name: str, most: int = limits.MAX_REQUEST_TOKENS
) -> None:
    """Raise ``TooManyItems`` when texts of ``size`` bytes have too many tokens together."""
    tokens = limits.estimate_tokens(size, texts)
    if tokens > most:
        raise TooManyItems(
            f"{field_name} has about {tokens} tokens; at most {most} are accepted in one request",
            field=field_name,
        )


def check_repeated(text: object, times: int, field_name: str) -> None:
    """Check what the model reads with each of ``times`` texts: a prompt, a query, an instruction.

    It may be empty. A job's bytes bound the texts themselves, but not what each of them brings.
    """
    if not isinstance(text, str):
        raise InvalidInput(f"{field_name} must be a string", field=field_name)
    size = check_text(text, field_name) if text and not text.isspace() else len(text)
    check_tokens(size * times, times, field_name)


@contextmanager
def naming_texts(field_name: str, *, alone: bool = False) -> Iterator[None]:
    """Let what the engine says of texts name them as the caller knows them.

    ``alone``: the field is the text itself, not a list of texts.
    """
    try:
        yield
    except (TextsTooLong, EngineFailed) as error:
        raise error.named(field_name, alone=alone) from error


def check_document_id(value: object) -> int:
    """Check a document's id and return its length in bytes."""
    if not isinstance(value, str) or not value:
        raise InvalidInput("id must be a string that is not empty", field="id")
    size = _utf8_length(value, "id")
    if size > limits.MAX_ID_BYTES:
        raise InvalidInput(
            f"id has {size} bytes; at most {limits.MAX_ID_BYTES} are accepted", field="id"
        )
    return size


def parse_document(row: Mapping[str, Any]) -> Document:
    """The document that a mapping with id, text and, at will, metadata and version describes.

    Raises an ``InvalidInput`` that names the field at fault.
    """
    if not row.keys() <= _FIELDS:
        unknown = sorted(str(name) for name in row.keys() - _FIELDS)[0]
        raise UnknownField(
            f"{unknown} is not a field of a document (id, text, metadata, version); "
            "put it into metadata",
            field=unknown,
        )
    document_id = row.get("id")
    size = check_document_id(document_id)
    text = row.get("text")
    size += check_text(text)
    metadata = row.get("metadata")
    encoded = None if metadata is None else encode_metadata(metadata)
    if encoded is not None:
        size += len(encoded)
    version = row.get("version")
    if version is not None and (
        isinstance(version, bool) or not isinstance(version, int) or not 0 < version <= _MAX_VERSION
    ):
        raise InvalidInput("version must be a whole number from 1 to 2^63-1", field="version")
    return Document(str(document_id), str(text), encoded, version, size)


def check_version(document: Document, versions: str) -> None:
    """Check that a document has a version exactly where its collection has given versions."""
    if versions == "given" and document.version is None:
        raise InvalidInput(
            "version is missing; this collection's versions are given by the caller",
            field="version",
        )
    if versions == "assigned" and document.version is not None:
        raise InvalidInput(
            "version must be left out; this collection assigns the versions itself",
            field="version",
        )


def _utf8_length(text: str, field_name: str) -> int:
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{field_name} is not valid Unicode: {error}", field=field_name
        ) from None


@dataclass(slots=True)
class Block:
    """The documents of one embed job, as columns."""

    ids: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    metadata: list[bytes | None] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)
    size: int = 0  # bytes

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, document: Document) -> None:
        """Append one document."""
        self.ids.append(document.id)
        self.texts.append(document.text)
        self.metadata.append(document.metadata)
        self.versions.append(document.version)
        self.size += document.size

    def fits(self, document: Document) -> bool:
        """Whether ``document`` may still join."""
        return (
            len(self) < limits.BLOCK_DOCUMENTS and self.size + document.size <= limits.BLOCK_BYTES
        )

    @property
    def tokens(self) -> int:
        """Estimated tokens of the texts."""
        return limits.estimate_tokens(self.size, len(self))

    def to_wire(self) -> dict[str, Any]:
        """The columns of an ``embed`` payload; columns that hold nothing are left out."""
        wire: dict[str, Any] = {"ids": self.ids, "texts": self.texts}
        if any(entry is not None for entry in self.metadata):
            wire["metadata"] = self.metadata
        if self.versions and self.versions[0] is not None:
            wire["versions"] = self.versions
        return wire


def cut_blocks(documents: Iterable[Document]) -> Iterator[Block]:
    """Cut a stream into blocks; the same stream is always cut the same way."""
    block = Block()
    for document in documents:
        if not block.fits(document) and len(block):
            yield block
            block = Block()
        block.add(document)
    if len(block):
        yield block
