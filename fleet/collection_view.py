"""How a collection is shown: as a row of a table, and as JSON."""

from __future__ import annotations

from typing import Any

from vecfleet.producer.found import CollectionStatus

COLLECTION_COLUMNS = ("collection", "model", "documents", "segments", "MiB")


def collection_row(entry: CollectionStatus) -> tuple[object, ...]:
    """Its values under ``COLLECTION_COLUMNS``."""
    named = (entry.collection.name, entry.collection.spec.model)
    if entry.stats is None:
        return (*named, "?", "?", "?")
    stats = entry.stats
    size = f"{stats['bytes'] / 2**20:,.1f}"
    return (*named, f"{stats['documents']:,}", stats["segments"], size)


def collection_json(entry: CollectionStatus) -> dict[str, Any]:
    """Its record, and its statistics where the search process tells them."""
    return {**entry.collection.to_wire(), "stats": entry.stats}
