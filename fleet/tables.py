"""Tables on a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text


def table_of(columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> Table:
    """A table without lines; columns of numbers stand to the right."""
    table = Table(box=None, pad_edge=True)
    for place, column in enumerate(columns):
        is_number = bool(rows) and not any(c.isalpha() for c in str(rows[0][place]))
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    return table
