"""The figures beside their targets: as a file for programs, as a table for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vecfleet.bench.targets import BY_KEY, TARGETS, Measured

_VERDICTS = {True: "[green]yes[/]", False: "[red]no[/]", None: "[yellow]not valid[/]"}


def entry_of(key: str, measured: Measured, *, valid: bool) -> dict[str, Any]:
    """One entry of the file; ``ok`` is null for sizes too small to judge by."""
    target = BY_KEY[key]
    ok = target.is_met_by(measured.value) and measured.also
    return {
        "value": _short(measured.value),
        "target": target.target,
        "ok": ok if valid else None,
        "detail": {**measured.detail, "at": datetime.now(UTC).isoformat(timespec="seconds")},
    }


def write(path: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``entries``, keeping what the file says of other keys; returns all of it."""
    merged: dict[str, Any] = {}
    if path.exists():
        merged = json.loads(path.read_text())
    merged = {key: (merged | dict(entries))[key] for key in BY_KEY if key in {**merged, **entries}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n")
    return merged


def show(entries: Mapping[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title="vecfleet bench")
    for name in ("key", "what", "target", "value", "ok"):
        table.add_column(name, no_wrap=name != "what", overflow="fold")
    for target in TARGETS:
        if target.key not in entries:
            continue
        entry = entries[target.key]
        sign = ">=" if target.better == "more" else "<="
        table.add_row(
            target.key,
            target.what,
            f"{sign} {target.target:,g}",
            f"{entry['value']:,g}",
            _VERDICTS[entry["ok"]],
        )
    console.print(table)


def _short(value: float) -> float:
    return round(value) if abs(value) >= 1000 else round(value, 4)
