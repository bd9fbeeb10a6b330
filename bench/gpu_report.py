"""The figures of the bench on a GPU: written as they come, shown as a table at the end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table; a figure without a target is only told."""

    key: str
    what: str
    unit: str = ""
    target: float | None = None  # at least


FIGURES = (
    Figure("matmul_tflops", "bf16 matrix rate, the best of square sizes", "TFLOP/s"),
    Figure("embed_docs_per_s", "bare engine, passages of 128 tokens", "docs/s"),
    Figure("embed_tokens_per_s", "", "tokens/s"),
    Figure("embed_rate_share", "of the matrix rate", "", 0.40),
    Figure("embed_gpu_busy", "share of the time that the GPU worked"),
    Figure("mixed_docs_per_s", "bare engine, docstrings of mixed length", "docs/s"),
    Figure("mixed_tokens_per_s", "", "tokens/s"),
    Figure("mixed_rate_share", "of the matrix rate"),
    Figure("rerank_pairs_per_s", "bare engine, a query and 128-token documents", "pairs/s"),
    Figure("rerank_tokens_per_s", "", "tokens/s"),
    Figure("rerank_rate_share", "of the matrix rate", "", 0.35),
    Figure("rerank_gpu_busy", "share of the time that the GPU worked"),
    Figure("fleet_docs_per_s", "producer to committed index, the same passages", "docs/s"),
    Figure("fleet_tokens_per_s", "", "tokens/s"),
    Figure("fleet_rate_share", "of the matrix rate"),
    Figure("fleet_efficiency", "fleet ÷ bare engine", "", 0.95),
    Figure("fleet_gpu_busy", "share of the time that the GPU worked during bulk", "", 0.95),
    Figure("query_idle_p50_ms", "a query in an idle fleet", "ms"),
    Figure("query_p50_ms", "a query while bulk saturates the GPU", "ms"),
    Figure("query_p99_ms", "", "ms"),
    Figure("query_p50_steps", "its p50 ÷ a bulk step's"),
)
BY_KEY = {figure.key: figure for figure in FIGURES}
_VERDICTS = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}


class Report:
    """What is known so far. A run that is cut leaves what it had found."""

    def __init__(self, path: Path, *, valid: bool) -> None:
        """``valid`` is whether sizes are large enough to be judged by."""
        self._path = path
        self._valid = valid
        self.told: dict[str, Any] = {
            "finished": False,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {},
            "settings": {},
            "models": {},
            "figures": {},
        }

    def note(self, part: str, **values: Any) -> None:
        """Add to ``machine``, ``settings`` or ``models``."""
        self.told[part].update(values)
        self._write()

    def figure(self, key: str, value: float, **detail: Any) -> None:
        """Set a figure."""
        known = BY_KEY[key]
        judged = self._valid and known.target is not None
        self.told["figures"][key] = {
            "value": _short(value),
            "unit": known.unit,
            "target": known.target,
            "ok": value >= known.target if judged and known.target is not None else None,
            "detail": detail,
        }
        self._write()

    def finish(self, seconds: float) -> None:
        """All was measured."""
        self.told |= {"finished": True, "seconds": round(seconds, 1)}
        self._write()

    @property
    def missed(self) -> list[str]:
        """The figures that miss their target."""
        return [key for key, entry in self.told["figures"].items() if entry["ok"] is False]

    def show(self, console: Console) -> None:
        """Print the table."""
        table = Table(title="vecfleet on " + str(self.told["machine"].get("device_name", "?")))
        for name in ("figure", "what", "value", "target", "ok"):
            table.add_column(name, no_wrap=name != "what")
        for figure in FIGURES:
            entry = self.told["figures"].get(figure.key)
            if entry is None:
                continue
            table.add_row(
                figure.key,
                figure.what,
                f"{entry['value']:,g} {figure.unit}".strip(),
                "" if figure.target is None else f">= {figure.target:g}",
                _VERDICTS[entry["ok"]],
            )
        console.print(table)

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(self.told, indent=2, ensure_ascii=False) + "\n")
        fresh.replace(self._path)


def _short(value: float) -> float:
    return round(value) if abs(value) >= 1000 else float(f"{value:.4g}")
