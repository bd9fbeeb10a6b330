"""What clients found wrong, and what the catalogue and a power cut owe them."""

from __future__ import annotations

from collections.abc import Collection

from chaos import power
from chaos.client_ledger import read_collections, read_notes
from chaos.fleet import Fleet


def complaints(fleet: Fleet, collections: Collection[str]) -> list[str]:
    """In words; ``collections`` are those that the index holds."""
    wrong = []
    for path in fleet.ledgers():
        for note in read_notes(path, "wrong"):
            wrong.append(f"{path.stem}-{note.number}: {note.fields['said']}")
        for name, exists in read_collections(path).items():
            if exists != (name in collections):
                said = "created" if exists else "deleted"
                wrong.append(f"{path.stem}: collection {name} was {said}, and is so no more")
    everysec = fleet.plan.persistence == "everysec"
    return wrong + power.complaints(fleet.cuts, fleet.ledgers(), everysec=everysec)
