"""Which submission a call is: the id that its name stands for, and its journal."""

from __future__ import annotations

import re
from pathlib import Path

from vecfleet.common.collection import Collection
from vecfleet.common.errors import InvalidInput
from vecfleet.common.names import new_id
from vecfleet.common.submission import id_of_name
from vecfleet.producer.journal import Journal

_ID = re.compile(r"[0-9a-f]{32}")
_MAX_NAME_BYTES = 256


def begin(
    collection: Collection, name: str | None, path: str | Path | None, folder: Path | None
) -> tuple[str, Journal | None]:
    """The submission's id, and its journal where one is kept: at ``path``, else in ``folder``.

    Without a ``name`` the journal at ``path`` says which one it is; else it is a new one. Raises
    what ``Journal.open`` raises, and ``InvalidInput`` for a name that is none.
    """
    id = None if name is None else submission_id(collection, name)
    about = {"collection": collection.name, "uid": collection.uid}
    if path is not None:
        journal = Journal.open(Path(path), submission=id, **about)
        if journal is None:
            journal = Journal.open(Path(path), submission=new_id(), **about)
        assert journal is not None
        return journal.submission, journal
    id = id or new_id()
    if folder is None:
        return id, None
    return id, Journal.open(folder / f"{id}.jsonl", submission=id, **about)


def submission_id(collection: Collection, name: str) -> str:
    """The id that a submission's name stands for in a collection; an id stands for itself.

    The gateway makes the same id of an ``Idempotency-Key``. Raises ``InvalidInput``.
    """
    if _ID.fullmatch(name):
        return name
    if not 0 < len(name.encode(errors="replace")) <= _MAX_NAME_BYTES or not name.isprintable():
        raise InvalidInput(
            f"submission must be 1 to {_MAX_NAME_BYTES} printable bytes", field="submission"
        )
    return id_of_name(collection, name)
