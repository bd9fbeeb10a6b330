"""One entry of the dead letter: read from its job's hash, and its texts edited."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vecfleet.common import codec, limits
from vecfleet.common.document import check_text
from vecfleet.common.errors import InvalidInput, JobFailed, VecfleetError
from vecfleet.common.hashing import text_key
from vecfleet.common.payloads import computed_together

_NO_SUBMISSION = "."  # no submission's name begins so
_MERGE = re.compile(r"vf\.[^.]+\.merge\.([0-9a-f]+)-\d+\.bulk")
FIELDS = (
    "status",
    "origin",
    "vf_error",
    "vf_died",
    "vf_died_with",
    "vf_attempts",
    "vf_sub",
    "vf_from",
    "vf_merge",
    "vf_docs",
    "vf_version",
)


@dataclass(frozen=True, slots=True)
class DeadDocument:
    """A document of an entry."""

    id: str
    text: str | None  # None in a deletion


@dataclass(frozen=True, slots=True)
class DeadEntry:
    """What sits in the dead letter under one id."""

    id: str
    queue: str
    tenant: str
    task: str  # "embed", "rerank" or "merge": where it failed
    uid: str  # of its collection; empty for what has none
    submission: str
    code: str
    message: str
    attempts: int
    worker: str
    died_ms: int  # by Redis's clock
    version: int  # 0 where the caller gives them
    count: int  # documents
    documents: tuple[DeadDocument, ...] = ()  # empty where its data is no texts, or too large
    died: str = field(default="", repr=False)  # the same as kept: whether it is still this entry

    def to_wire(self, collection: str = "", preview: int | None = None) -> dict[str, Any]:
        """As JSON; ``preview`` cuts texts to so many characters."""
        return {
            "id": self.id,
            "collection": collection,
            "tenant": self.tenant,
            "task": self.task,
            "submission": self.submission,
            "error": {"code": self.code, "message": self.message},
            "attempts": self.attempts,
            "worker": self.worker,
            "died_at": self.died_ms / 1000,
            "version": self.version,
            "count": self.count,
            "documents": [
                {"id": d.id, "text": d.text if d.text is None else d.text[:preview]}
                for d in self.documents
            ],
        }


def entry_of(entry_id: str, row: Sequence[bytes | None]) -> DeadEntry | None:
    """The entry of a job's fields; None where the job is none of ours, or not dead."""
    status, queue, error, died, worker, attempts, sub, late, merge, docs, version = (
        b"" if value is None else value for value in row
    )
    parts = queue.decode(errors="replace").split(".")
    if status != b"failed" or len(parts) != 5 or parts[0] != "vf":
        return None
    code, message = _told(error)
    in_merge = _MERGE.fullmatch(queue.decode()) or _MERGE.fullmatch(merge.decode(errors="replace"))
    return DeadEntry(
        id=entry_id,
        queue=queue.decode(),
        tenant=parts[1],
        task=parts[2],
        uid=in_merge[1] if in_merge else "",
        submission=(sub or late).decode(errors="replace").removeprefix(_NO_SUBMISSION),
        code=code,
        message=message,
        attempts=_whole(attempts),
        worker=worker.decode(errors="replace"),
        died_ms=_whole(died),
        version=_whole(version),
        count=_whole(docs),
        died=died.decode(errors="replace"),
    )


def _told(error: bytes) -> tuple[str, str]:
    """Code and message of the failure; stock tools say nothing that we can read."""
    try:
        wire = codec.loads(error) if error else {}
    except VecfleetError:
        wire = {}
    wire = wire if isinstance(wire, dict) else {}
    return str(wire.get("code", JobFailed.code)), str(wire.get("message", ""))


def documents_of(data: bytes) -> tuple[DeadDocument, ...]:
    """The texts of a job, the ids of a deletion; nothing of what is neither."""
    try:
        _, (payload,), _ = codec.unpack_call(codec.inflate(data))
    except (VecfleetError, ValueError):
        return ()
    if not isinstance(payload, dict):
        return ()
    ids, texts = payload.get("ids"), payload.get("texts")
    if isinstance(ids, list) and isinstance(texts, list) and len(ids) == len(texts):
        return tuple(DeadDocument(str(i), str(t)) for i, t in zip(ids, texts, strict=True))
    if ids is None and isinstance(texts, list):  # somebody waited for these
        return tuple(DeadDocument("", str(text)) for text in texts)
    if isinstance(payload.get("documents"), list):
        pair = [payload.get("query"), *payload["documents"]]
        return tuple(DeadDocument("", str(text)) for text in pair)
    gone = payload.get("delete")
    return tuple(DeadDocument(str(i), None) for i in gone) if isinstance(gone, list) else ()


def text_keys(data: bytes) -> list[str]:
    """The digests under which the texts of a job are remembered when they kill."""
    try:
        _, (payload,), _ = codec.unpack_call(codec.inflate(data))
        return [text_key(*parts) for parts in computed_together(payload)]
    except (VecfleetError, ValueError, TypeError, KeyError, AttributeError):
        return []


def edited(raw: bytes, text: str, document: str | None) -> tuple[bytes, int]:
    """The job's data with another text in it, and its estimated tokens."""
    check_text(text)
    ids: Any = None
    try:
        function, (payload,), _ = codec.unpack_call(codec.inflate(raw))
        ids, texts = payload["ids"], list(payload["texts"])
    except (VecfleetError, ValueError, TypeError, KeyError):
        pass
    if not isinstance(ids, list) or len(ids) != len(texts):
        raise InvalidInput("this entry holds no texts to replace", field="text")
    if document is None and len(ids) > 1:
        raise InvalidInput(
            f"the entry holds {len(ids)} documents: say with document whose text it is",
            field="document",
        )
    name = ids[0] if document is None else document
    if name not in ids:
        raise InvalidInput("the entry holds no document of this id", field="document")
    texts[ids.index(name)] = text
    size = sum(len(str(one).encode(errors="replace")) for one in texts)
    data = codec.pack_call(function, {**payload, "texts": texts})
    return data, limits.estimate_tokens(size, len(texts))


def _whole(value: bytes) -> int:
    try:
        return int(value or 0)
    except ValueError:
        return 0
