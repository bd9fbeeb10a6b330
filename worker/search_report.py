"""What the reader of a partition answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hit:
    """One document that a search found."""

    id: str
    score: float  # cosine
    text: str
    metadata: bytes | None  # a JSON object


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """One document as the index holds it."""

    id: str
    text: str
    metadata: bytes | None
    version: int


@dataclass(frozen=True, slots=True)
class ReaderStats:
    """A view in numbers."""

    documents: int
    segments: int
    indexed_documents: int
    nbytes: int
    generation: int
    quarantined: tuple[str, ...]  # files that could not be used; their documents are missing
