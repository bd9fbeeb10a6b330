"""Every error that vecfleet raises on purpose, and its answer over HTTP.

VecfleetError
├── InvalidInput                400  invalid_input
│   ├── EmptyText               400  empty_text
│   ├── TextTooLong             400  text_too_long
│   │   └── TextsTooLong        400  texts_too_long          (carries indices)
│   ├── InvalidVector           400  invalid_vector
│   ├── InvalidName             400  invalid_name
│   ├── UnknownField            400  unknown_field
│   ├── TooManyItems            400  too_many_items
│   ├── BodyTooLarge            413  body_too_large
│   └── BodyTooSlow             408  body_too_slow
├── Unauthorized                401  unauthorized
├── Forbidden                   403  forbidden
├── NotFound                    404  not_found
│   ├── UnknownModel            404  model_not_found
│   ├── UnknownCollection       404  collection_not_found
│   ├── UnknownDocument         404  document_not_found
│   ├── UnknownSubmission       404  submission_not_found
│   └── UnknownEntry            404  dead_entry_not_found
├── Conflict                    409  conflict
│   ├── CollectionConflict      409  collection_conflict
│   └── SpaceMismatch           409  space_mismatch
├── QueueFull                   429  queue_full              (carries retry_after_s)
├── Unavailable                 503  unavailable             (carries retry_after_s)
│   ├── NoWorker                503  no_worker
│   ├── EngineBroken            503  engine_broken
│   ├── EngineDied              503  engine_died
│   ├── EngineStarting          503  engine_starting
│   └── RedisUnavailable        503  redis_unavailable
├── DeadlineExceeded            504  deadline_exceeded
├── JobCancelled                409  job_cancelled
├── JobFailed                   500  job_failed
│   └── EngineFailed            422  engine_failed           (carries indices)
│       └── PoisonText          422  poison_text             (carries indices)
├── CorruptData                 500  corrupt_data
│   ├── CorruptPayload          400  corrupt_payload
│   ├── CorruptShard            500  corrupt_shard
│   ├── CorruptSegment          500  corrupt_segment
│   └── CorruptManifest         500  corrupt_manifest
├── StaleWriter                 500  stale_writer
└── ConfigError                 500  config_error

The first sentence of a class's docstring is its default message.  ``HTTP_STATUS`` is the one table
from an error's code to its HTTP status; errors that cross Redis travel as their code, message and
field (``to_wire``), and come back as the same class (``from_wire``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class VecfleetError(Exception):
    """Something went wrong in vecfleet."""

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str = "",
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """``field`` names the offending input field; ``retry_after_s`` when to try again."""
        self.message = message or _default_message(type(self))
        self.field = field
        self.retry_after_s = retry_after_s
        super().__init__(self.message)

    def to_wire(self) -> dict[str, Any]:
        """The error as plain data, for a job's reply or the dead letter."""
        wire: dict[str, Any] = {"code": self.code, "message": self.message}
        if self.field is not None:
            wire["field"] = self.field
        if self.retry_after_s is not None:
            wire["retry_after_s"] = self.retry_after_s
        return wire


class InvalidInput(VecfleetError):
    """The input is not valid."""

    code = "invalid_input"
    http_status = 400


class EmptyText(InvalidInput):
    """The text is empty; send at least one character that is not white space."""

    code = "empty_text"


class TextTooLong(InvalidInput):
    """The text is longer than the model reads; shorten it or allow truncation."""

    code = "text_too_long"


class TextsTooLong(TextTooLong):
    """Some texts are longer than the model reads; shorten them or allow truncation."""

    code = "texts_too_long"

    def __init__(self, message: str = "", *, indices: Sequence[int] = (), **kwargs: Any) -> None:
        """``indices`` are the places of the long texts in the call."""
        super().__init__(message, **kwargs)
        self.indices = tuple(indices)

    def to_wire(self) -> dict[str, Any]:
        """With ``indices``, where there are any."""
        wire = super().to_wire()
        return {**wire, "indices": list(self.indices)} if self.indices else wire

    def moved(self, by: int) -> TextsTooLong:
        """The error of a call whose texts stand ``by`` places further on."""
        places = [by + place for place in self.indices]
        return TextsTooLong(self.message, indices=places, field=self.field)

    def named(self, field: str, *, alone: bool = False) -> TextsTooLong:
        """The error for who gave the texts as the list ``field``, or as ``field`` itself.

        One that has a field keeps it: then the query was too long.
        """
        if self.field is not None or not self.indices:
            return self
        first = field if alone else f"{field}[{self.indices[0]}]"
        more = len(self.indices) - 1
        what = f"{first} and {more} more are" if more else f"{first} is"
        message = f"{what} longer than the model reads; shorten the text or allow truncation"
        return TextsTooLong(message, indices=self.indices, field=first)


class InvalidVector(InvalidInput):
    """The vector has the wrong dimension, is zero, or holds NaN or infinity."""

    code = "invalid_vector"


class InvalidName(InvalidInput):
    """The name may hold 1 to 64 of a-z, A-Z, 0-9, '_', '-' and '.', and must not begin with '.'."""

    code = "invalid_name"


class UnknownField(InvalidInput):
    """The field is not known here; remove it or correct its spelling."""

    code = "unknown_field"


class TooManyItems(InvalidInput):
    """The request holds too many items; split it."""

    code = "too_many_items"


class ReplyTooLarge(InvalidInput):
    """The answer would be too large; ask for fewer documents at a time."""

    code = "reply_too_large"


class BodyTooLarge(InvalidInput):
    """The body is too large; split it."""

    code = "body_too_large"
    http_status = 413


class BodyTooSlow(InvalidInput):
    """The body came too slowly; send it again over a faster connection."""

    code = "body_too_slow"
    http_status = 408
    retryable = True


class Unauthorized(VecfleetError):
    """Send a valid API key, as Authorization: Bearer KEY or as X-API-Key: KEY."""

    code = "unauthorized"
    http_status = 401


class Forbidden(VecfleetError):
    """The API key does not have the scope that this takes."""

    code = "forbidden"
    http_status = 403


class NotFound(VecfleetError):
    """There is no such thing here."""

    code = "not_found"
    http_status = 404


class UnknownModel(NotFound):
    """No worker has announced this model; see GET /v1/models for those that are served."""

    code = "model_not_found"


class UnknownCollection(NotFound):
    """There is no collection of this name; create it first."""

    code = "collection_not_found"


class UnknownDocument(NotFound):
    """The collection holds no document with this id."""

    code = "document_not_found"


class UnknownSubmission(NotFound):
    """There is no submission with this id, or it has expired."""

    code = "submission_not_found"


class UnknownEntry(NotFound):
    """The dead letter holds no such entry; somebody may have tried it again or dropped it."""

    code = "dead_entry_not_found"


class Conflict(VecfleetError):
    """The request contradicts what is already there."""

    code = "conflict"
    http_status = 409


class CollectionConflict(Conflict):
    """A collection of this name exists with other settings."""

    code = "collection_conflict"


class SpaceMismatch(Conflict):
    """These vectors come from another space than the collection's and cannot be compared."""

    code = "space_mismatch"


class QueueFull(VecfleetError):
    """The queue is full; try again later."""

    code = "queue_full"
    http_status = 429
    retryable = True


class Unavailable(VecfleetError):
    """The service cannot answer now; try again later."""

    code = "unavailable"
    http_status = 503
    retryable = True


class NoWorker(Unavailable):
    """No worker serves this model now; start one or try again later."""

    code = "no_worker"


class EngineBroken(Unavailable):
    """The engine fails on everything; its worker ends, and others take its jobs over."""

    code = "engine_broken"


class EngineDied(Unavailable):
    """The engine died, or broke for good, while it computed this; try again later."""

    code = "engine_died"


class EngineStarting(Unavailable):
    """The engine is started anew after its process died; try again later."""

    code = "engine_starting"


class RedisUnavailable(Unavailable):
    """Redis does not answer; check its address and that it runs."""

    code = "redis_unavailable"


class DeadlineExceeded(VecfleetError):
    """The answer did not come in time."""

    code = "deadline_exceeded"
    http_status = 504
    retryable = True


class JobCancelled(VecfleetError):
    """The job was cancelled."""

    code = "job_cancelled"
    http_status = 409


class JobFailed(VecfleetError):
    """The job failed."""

    code = "job_failed"


class EngineFailed(JobFailed):
    """The model cannot compute this text, though it computes others."""

    code = "engine_failed"
    http_status = 422  # another try, as many clients make after a 500, would fail as well

    def __init__(
        self,
        message: str = "",
        *,
        indices: Sequence[int] = (),
        each: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """``indices`` are the places in the call of the texts it failed on; none: all of them.

        ``each`` is what is to be said of each of them; it does not travel.
        """
        super().__init__(message, **kwargs)
        self.indices = tuple(indices)
        self.each = tuple(each)

    def to_wire(self) -> dict[str, Any]:
        """With ``indices``, where there are any."""
        wire = super().to_wire()
        return {**wire, "indices": list(self.indices)} if self.indices else wire

    def moved(self, by: int) -> EngineFailed:
        """The error of a call whose texts stand ``by`` places further on."""
        places = [by + place for place in self.indices]
        return type(self)(self.message, indices=places, field=self.field)

    def named(self, field: str, *, alone: bool = False) -> EngineFailed:
        """The error for who gave the texts as the list ``field``, or as ``field`` itself."""
        if self.field is not None or not self.indices:
            return self
        first = field if alone else f"{field}[{self.indices[0]}]"
        return type(self)(f"{first}: {self.message}", indices=self.indices, field=first)


class PoisonText(EngineFailed):
    """The worker died each time that it computed this text; it is not tried again."""

    code = "poison_text"


class CorruptData(VecfleetError):
    """Stored data does not match its checksum."""

    code = "corrupt_data"


class CorruptPayload(CorruptData):
    """The job's payload cannot be read; it does not follow the wire contract."""

    code = "corrupt_payload"
    http_status = 400


class CorruptShard(CorruptData):
    """A shard does not match its checksum or its own lengths."""

    code = "corrupt_shard"


class CorruptSegment(CorruptData):
    """A segment file does not match its checksum; it was moved to the quarantine."""

    code = "corrupt_segment"


class CorruptManifest(CorruptData):
    """The manifest cannot be read."""

    code = "corrupt_manifest"


class StaleWriter(VecfleetError):
    """Another writer has taken this partition over; this one must stop."""

    code = "stale_writer"


class ConfigError(VecfleetError):
    """A setting is not valid."""

    code = "config_error"


def _default_message(cls: type[VecfleetError]) -> str:
    return (cls.__doc__ or cls.code).split("\n", 1)[0]


def _tree(cls: type[VecfleetError]) -> list[type[VecfleetError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _tree(child))]


BY_CODE: dict[str, type[VecfleetError]] = {cls.code: cls for cls in _tree(VecfleetError)}
HTTP_STATUS: dict[str, int] = {code: cls.http_status for code, cls in BY_CODE.items()}


def from_wire(wire: dict[str, Any]) -> VecfleetError:
    """Rebuild the error that ``to_wire`` wrote; an unknown code becomes a ``JobFailed``."""
    cls = BY_CODE.get(str(wire.get("code")), JobFailed)
    retry_after = wire.get("retry_after_s")
    error = cls(
        str(wire.get("message", "")),
        field=wire.get("field"),
        retry_after_s=None if retry_after is None else float(retry_after),
    )
    if isinstance(error, TextsTooLong | EngineFailed):
        error.indices = tuple(wire.get("indices", ()))
    return error
