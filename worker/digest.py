"""Digests that stand for a document's id and for its content in the index."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

ID_KEY_BYTES = 16
CONTENT_KEY_BYTES = 8

IdKeys = NDArray[np.uint64]  # (n, 2)
ContentKeys = NDArray[np.uint64]  # (n,)


def id_keys(ids: Sequence[str]) -> IdKeys:
    """The 128-bit key of each id, as (n, 2) little-endian 64-bit words."""
    digests = b"".join([blake2b(i.encode(), digest_size=ID_KEY_BYTES).digest() for i in ids])
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


def content_keys(
    texts: Sequence[str], metadata: Sequence[bytes | None] | None = None
) -> ContentKeys:
    """The 64-bit key of each text together with its metadata (JSON bytes), as (n,).

    The metadata belongs to it: a document whose metadata alone changed has to be stored again.
    """
    if metadata is None or not any(metadata):
        digests = [blake2b(t.encode(), digest_size=CONTENT_KEY_BYTES).digest() for t in texts]
    else:
        digests = [_content_key(t, m) for t, m in zip(texts, metadata, strict=True)]
    return np.frombuffer(b"".join(digests), "<u8")


def shard_key(shard_id: str) -> bytes:
    """16 bytes that stand for a shard among those that were applied."""
    return blake2b(shard_id.encode(), digest_size=16).digest()


def _content_key(text: str, metadata: bytes | None) -> bytes:
    if not metadata:
        return blake2b(text.encode(), digest_size=CONTENT_KEY_BYTES).digest()
    digest = blake2b(text.encode(), digest_size=CONTENT_KEY_BYTES, person=b"metadata")
    digest.update(b"\0" + metadata + len(metadata).to_bytes(4, "little"))
    return digest.digest()
