"""The dead letter as a terminal shows it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from rich.table import Table
from rich.text import Text

from vecfleet.common.dead_entry import DeadEntry
from vecfleet.common.errors import Unavailable
from vecfleet.common.fleet_client import FleetClient

_PREVIEW_CHARACTERS = 80
_COLUMNS = ("when", "collection", "document", "error", "attempts", "text", "id")


async def names_of(fleet: FleetClient, entries: Sequence[DeadEntry]) -> dict[str, str]:
    """The collections' names by uid; none while nobody knows them."""
    names: dict[str, str] = {}
    for tenant in {entry.tenant for entry in entries}:
        try:
            names |= {c.uid: c.name for c in await fleet.collections(tenant=tenant)}
        except Unavailable:
            continue
    return names


def row(entry: DeadEntry, names: dict[str, str]) -> tuple[str, ...]:
    """An entry in a line: when, collection, document, error, attempts, text, id."""
    first = entry.documents[0] if entry.documents else None
    document = "" if first is None else first.id
    if entry.count > 1:
        document = f"{document} and {entry.count - 1} more" if document else f"{entry.count}"
    text = "" if first is None else " ".join((first.text or "").split())[:_PREVIEW_CHARACTERS]
    return (
        when(entry),
        names.get(entry.uid, entry.uid),
        harmless(" ".join(document.split())),
        harmless(entry.code),
        str(entry.attempts),
        harmless(text),
        harmless(entry.id),
    )


def table(rows: Sequence[tuple[str, ...]]) -> Table:
    """The rows under their heads."""
    table = Table(box=None, pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def harmless(text: str) -> str:
    """Without the control characters by which a document could take over a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def when(entry: DeadEntry) -> str:
    """When the entry died, ISO 8601."""
    return datetime.fromtimestamp(entry.died_ms / 1000, UTC).isoformat(timespec="seconds")
