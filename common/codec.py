"""msgpack, for every payload and result; never pickle, never JSON floats.

``Serializer`` is what a stock RQ ``Queue(serializer=...)`` takes. A job's data is the msgpack array
``[function name, nil, arguments, keyword arguments]``, as RQ lays it out.
"""

from __future__ import annotations

import zlib
from typing import Any

import msgpack

from vecfleet.common.errors import CorruptPayload

MAX_PAYLOAD_BYTES = 8 << 20  # of what was compressed; our largest jobs have a few MiB
# Of a job's data; our own have ten arrays and maps. A byte can make an object of many.
MAX_CONTAINERS = 64
MAX_ITEMS = 4096  # of one array or map
_ZLIB = b"\x78"  # no msgpack array of four begins so


def dumps(value: Any) -> bytes:
    """``value`` as msgpack; raises ``TypeError`` for what msgpack cannot hold."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def dumps_for_lua(value: Any) -> bytes:
    """``value`` for Redis's cmsgpack, which knows strings of bytes but not msgpack's bin type."""
    packed: bytes = msgpack.packb(value, use_bin_type=False)
    return packed


def loads(data: bytes) -> Any:
    """What ``dumps`` wrote; raises ``CorruptPayload`` for anything else."""
    return _unpacked(data)


def _unpacked(data: bytes, **options: Any) -> Any:
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=True, **options)
    except MemoryError:
        raise CorruptPayload("the payload does not fit into memory") from None
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise CorruptPayload(f"the payload is not valid msgpack: {error}") from error


class _Containers:
    """Counts the arrays and maps of one job's data, and refuses too many."""

    def __init__(self) -> None:
        self._left = MAX_CONTAINERS

    def note(self, container: Any) -> Any:
        """The hook of msgpack: called with each array and map when it is complete."""
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"more than {MAX_CONTAINERS} arrays and maps")
        return container


class Serializer:
    """RQ's serializer protocol over msgpack."""

    @staticmethod
    def dumps(value: Any) -> bytes:
        """RQ's hook; tuples become arrays."""
        return dumps(value)

    @staticmethod
    def loads(data: bytes) -> Any:
        """RQ's hook."""
        return loads(data)


def is_compressed(data: bytes) -> bool:
    """Whether a job's data is RQ's zlib, as far as its first byte tells."""
    return data[:1] == _ZLIB


def inflate(data: bytes) -> bytes:
    """A job's data without RQ's zlib, bounded: a small job must not become a large one in memory.

    Stock queues compress, and so does RQ's requeue of one of our own jobs. Raises
    ``CorruptPayload`` for more than ``MAX_PAYLOAD_BYTES``.
    """
    if not is_compressed(data):
        return data
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(data, MAX_PAYLOAD_BYTES)
    except zlib.error:
        return data  # RQ reads data that was not compressed, so do we
    except MemoryError:
        raise CorruptPayload("the job's data does not fit into memory") from None
    if inflater.unconsumed_tail:
        raise CorruptPayload(f"the job's data has more than {MAX_PAYLOAD_BYTES} bytes")
    return plain


def pack_call(function: str, payload: Any) -> bytes:
    """A job's data: one call of ``function`` on one argument."""
    return dumps([function, None, [payload], {}])


def unpack_call(data: bytes) -> tuple[str, list[Any], dict[str, Any]]:
    """Function name, arguments and keyword arguments of a job's data.

    Raises ``CorruptPayload`` when the data does not have RQ's form, names a method of an object, or
    would become far more objects than any job of ours has.
    """
    note = _Containers().note
    call = _unpacked(
        data, list_hook=note, object_hook=note, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS
    )
    if not isinstance(call, list) or len(call) != 4:
        raise CorruptPayload("a job's data is an array of function, nil, arguments, keywords")
    function, instance, arguments, keywords = call
    if (
        not isinstance(function, str)
        or instance is not None
        or not isinstance(arguments, list)
        or not isinstance(keywords, dict)
    ):
        raise CorruptPayload("a job's data is an array of function, nil, arguments, keywords")
    return function, arguments, keywords
