"""A document's metadata: the one check of both doors and the worker, and how it is read again."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from typing import Any

import orjson

from vecfleet.common import limits
from vecfleet.common.errors import InvalidInput
from vecfleet.common.rare_log import RareLog

log = RareLog(logging.getLogger(__name__))

MAX_DEPTH = 32  # so that every reader, however deep in its own stack, can decode it
_LEAST_NUMBER, _MOST_NUMBER = -(2**63), 2**64 - 1  # what JSON's readers and writers take


def encode_metadata(metadata: object) -> bytes:
    """A document's metadata as it is kept, a JSON object in UTF-8.

    Raises an ``InvalidInput`` for what could not be read again as it is: numbers beyond 64 bits,
    NaN, text that is not Unicode, too deep or too much of it.
    """
    if not isinstance(metadata, dict):
        raise _invalid("metadata must be a JSON object")
    if _check_value(metadata, MAX_DEPTH, limits.MAX_METADATA_BYTES) < 0:
        raise _invalid(
            f"metadata is too large; at most {limits.MAX_METADATA_BYTES} bytes are accepted"
        )
    try:
        encoded = json.dumps(
            metadata, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        ).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise _invalid(f"metadata cannot be kept as JSON: {error}") from error
    _check_size(encoded)
    return encoded


def check_metadata(encoded: object) -> None:
    """Check metadata that somebody else encoded; raises as ``encode_metadata`` does."""
    if not isinstance(encoded, bytes):
        raise _invalid("metadata must be nil or an encoded JSON object")
    _check_size(encoded)
    _decoded(encoded)


def read_metadata(encoded: object, document_id: str) -> dict[str, Any] | None:
    """The metadata of a document of the index; None where there is none that can be read.

    An index that others wrote may hold what the check would have refused: the document is worth
    more than an error.
    """
    if encoded is None:
        return None
    try:
        if not isinstance(encoded, bytes):
            raise _invalid("metadata is not encoded")
        return _decoded(encoded)
    except InvalidInput:
        log.warning("the metadata of document %r cannot be read and is left out", document_id)
        return None


def _decoded(encoded: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"metadata is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise _invalid("metadata must be a JSON object")
    # Few documents have so many brackets, also in their texts, that they could be too deep.
    if encoded.count(b"{") + encoded.count(b"[") > MAX_DEPTH:
        _check_value(value, MAX_DEPTH, len(encoded))
    return value


def _check_size(encoded: bytes) -> None:
    if len(encoded) > limits.MAX_METADATA_BYTES:
        raise _invalid(
            f"metadata has {len(encoded)} bytes; at most {limits.MAX_METADATA_BYTES} are accepted"
        )


def _check_value(value: object, depth: int, room_bytes: int) -> int:
    """Raise where ``value`` is nested more than ``depth`` deep or holds too large a number.

    Returns how much of ``room_bytes`` its JSON leaves at most; once that is less than 0, what else
    it holds is not looked at.
    """
    children: Collection[object]
    if isinstance(value, dict):
        children = value.values()
    elif isinstance(value, list | tuple):
        children = value
    elif isinstance(value, str):
        return room_bytes - len(value)
    else:
        if isinstance(value, int) and not _LEAST_NUMBER <= value <= _MOST_NUMBER:
            raise _invalid("metadata holds a whole number of more than 64 bits; send it as text")
        return room_bytes
    if depth == 0:
        raise _invalid(f"metadata is nested more than {MAX_DEPTH} deep")
    room_bytes -= 2 * len(children)  # each has a byte at least, and one beside it
    if room_bytes >= 0 and isinstance(value, dict):
        room_bytes -= sum(len(key) for key in value if isinstance(key, str))
    for child in children:
        if room_bytes < 0:
            break
        room_bytes = _check_value(child, depth - 1, room_bytes)
    return room_bytes


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, field="metadata")
