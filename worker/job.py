"""A claimed job, and what may become of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vecfleet.common import codec, keys
from vecfleet.common.errors import CorruptPayload, VecfleetError
from vecfleet.common.limits import BYTES_PER_TOKEN


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job this worker holds the lease of."""

    id: str
    execution: str  # this claim of it; with the id it names the lease
    queue: keys.QueueName
    function: str  # "" when the data could not be read
    payload: Any
    tokens: int  # estimated cost
    claimed_us: int  # Redis TIME
    enqueued_us: int
    attempts: int  # claims so far, this one included, those that were not its fault left out
    box: str = ""  # whose reply box waits for the answer
    submission: str = ""
    block: int = 0
    documents: int = 0
    refused: int = 0  # documents of the block that an earlier stage refused
    merge_queue: str = ""
    version: int = 0  # assigned at the enqueue, 0 where none was
    named: int | None = None  # the place of the text at which its last worker died
    condemned: tuple[int, ...] = ()  # places of texts that have killed often enough
    is_apart: bool = False  # one document that its block went on without, tried again
    is_left: bool = False  # whoever waited for the answer does so no longer
    is_stock: bool = False  # enqueued by a stock RQ Queue: nobody admitted it
    timeout_s: float | None = None
    result_ttl_s: int = keys.RESULT_TTL_S
    size: int = 0  # bytes of its data, which may have come compressed
    error: VecfleetError | None = None  # why the data could not be read

    @property
    def is_suspect(self) -> bool:
        """Whether a worker died with it."""
        return self.attempts > 1

    @property
    def queue_ms(self) -> float:
        """How long it waited, by Redis's clock."""
        return max(0.0, (self.claimed_us - self.enqueued_us) / 1000)


@dataclass(frozen=True, slots=True)
class Refused:
    """One document of a block that cannot be embedded."""

    place: int
    id: str
    error: VecfleetError
    data: bytes = b""  # a call of the same function on this document alone
    tokens: int = 0  # estimated cost of that call

    def to_wire(self) -> dict[str, Any]:
        """As it travels in replies and stands with the submission."""
        return {"place": self.place, "id": self.id, **self.error.to_wire()}


@dataclass(frozen=True, slots=True)
class Answer:
    """The job is done; ``body`` goes to whoever waits."""

    body: Any
    size: int = 0  # bytes of the body, roughly, where it may be large


@dataclass(frozen=True, slots=True)
class HandOn:
    """The job moves on to another queue with new data."""

    queue: str
    data: bytes
    documents: int
    refused: Sequence[Refused] = ()


@dataclass(frozen=True, slots=True)
class Commit:
    """The job's block is in the index for good."""

    documents: int
    body: Any
    refused: Sequence[Refused] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """The job failed and will not be tried again."""

    error: VecfleetError
    refused: Sequence[Refused] = ()  # its texts for the dead letter, where a caller has the error


@dataclass(frozen=True, slots=True)
class Release:
    """The job goes back to the front of its queue, uncharged: it cannot be done here now.

    For ``rest_s`` this worker claims nothing more from that queue, if it asks for it by name.
    """

    rest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Abandoned:
    """The engine died of it, or beside it: its lease ends now, and it is judged as by rescue."""


Outcome = Answer | HandOn | Commit | Failure | Release | Abandoned


@dataclass(frozen=True, slots=True)
class Settlement:
    """A claimed job with its outcome."""

    job: ClaimedJob
    outcome: Outcome


def decode_claim(row: Sequence[Any], queue: keys.QueueName) -> ClaimedJob:
    """The job that a row of claim.lua's answer describes."""
    job_id, execution, _, claimed_us, data, cost, enqueued, box, sub, block, docs = row[:11]
    merge_queue, version, attempts, refused, timeout, result_ttl = row[11:17]
    named, condemned, apart_from, left = row[17:21]
    is_stock = cost is None
    function, payload, size, error = _read_call(data)
    return ClaimedJob(
        id=job_id.decode(),
        execution=execution.decode(),
        queue=queue,
        function=function,
        payload=payload,
        tokens=size // BYTES_PER_TOKEN if is_stock else _whole(cost),
        claimed_us=int(claimed_us),
        enqueued_us=_whole(enqueued) or int(claimed_us),
        attempts=_whole(attempts) + 1,
        box=_text(box),
        submission=_text(sub),
        block=_whole(block),
        documents=_whole(docs),
        refused=_whole(refused),
        merge_queue=_text(merge_queue),
        version=_whole(version),
        named=None if named is None else _whole(named),
        condemned=tuple(_whole(place) for place in condemned.split(b",")) if condemned else (),
        is_apart=apart_from is not None,
        is_left=left is not None,
        is_stock=is_stock,
        timeout_s=float(_whole(timeout)) or None,
        result_ttl_s=_result_ttl_s(result_ttl),
        size=size,
        error=error,
    )


def _read_call(data: bytes) -> tuple[str, Any, int, VecfleetError | None]:
    """Function, payload, bytes of the data as it was decoded, and why it could not be read."""
    size = len(data)
    try:
        plain = codec.inflate(data)
        size = len(plain)
        function, arguments, keywords = codec.unpack_call(plain)
        if len(arguments) != 1 or keywords:
            raise CorruptPayload(f"{function} takes one argument, the payload")
        return function, arguments[0], size, None
    except VecfleetError as error:
        return "", None, size, error


_MOST_DIGITS = 18  # what Redis counts with


def _whole(value: bytes | None, least: int = 0) -> int:
    """A field as a whole number; 0 for what is none: one bad field must not lose a whole claim."""
    try:
        return max(least, int(value or 0)) if len(value or b"") <= _MOST_DIGITS else 0
    except ValueError:
        return 0


_MOST_TTL_S = 1 << 31  # Redis refuses what overflows once it is in milliseconds


def _result_ttl_s(value: bytes | None) -> int:
    return keys.RESULT_TTL_S if value is None else min(_whole(value, least=-1), _MOST_TTL_S)


def _text(value: bytes | None) -> str:
    return value.decode(errors="replace") if value else ""
