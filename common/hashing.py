"""The keys by which the index knows documents, computed alike by workers and producers."""

from __future__ import annotations

from hashlib import blake2b

ID_KEY_BYTES = 16
CONTENT_KEY_BYTES = 8
TEXT_KEY_BYTES = 16


def id_key(document_id: str) -> bytes:
    """16 bytes that stand for a document's id; two ids never share them in practice."""
    return blake2b(document_id.encode(), digest_size=ID_KEY_BYTES).digest()


def content_key(text: str, metadata: bytes | None) -> bytes:
    """8 bytes that change when a document's text or metadata (JSON, encoded) does."""
    if not metadata:
        return blake2b(text.encode(), digest_size=CONTENT_KEY_BYTES).digest()
    digest = blake2b(text.encode(), digest_size=CONTENT_KEY_BYTES, person=b"metadata")
    digest.update(b"\0" + metadata + len(metadata).to_bytes(4, "little"))
    return digest.digest()


def text_key(*texts: str) -> str:
    """32 hex digits that stand for a text, or for the texts that are computed together."""
    digest = blake2b(digest_size=TEXT_KEY_BYTES)
    for text in texts:
        raw = text.encode()
        digest.update(len(raw).to_bytes(4, "little") + raw)
    return digest.hexdigest()
