"""What ``vecfleet compare`` shows to people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_COLOURS = {"kept": "green", "acceptable": "yellow", "not acceptable": "red"}
MIB = 1 << 20


def show_comparison(found: dict[str, Any], side_a: str, side_b: str) -> None:
    """Print the two sides, what lies between them, and the verdict."""
    console = Console()
    sides = found["a"], found["b"]
    for name, said in (("a", side_a), ("b", side_b)):
        console.print(f"[bold]{name}[/] {said}", highlight=False)
    table = Table(title=f"{found['task']}, {found['documents']} documents")
    for name in ("", "a", "b", "b ÷ a"):
        table.add_column(name, justify="left" if not name else "right", overflow="fold")
    for label, value in _facts():
        table.add_row(label, *(value(side) for side in sides), "")
    for label, key, scale, unit in _numbers(found["task"]):
        values = [side[key] for side in sides]
        if None in values:
            continue
        shown = (f"{value * scale:,.{1 if value * scale < 100 else 0}f}{unit}" for value in values)
        table.add_row(label, *shown, f"{values[1] / values[0]:.2f}" if values[0] else "")
    console.print(table)
    console.print(_agreement(found["agreement"], found["task"]), highlight=False)
    said, reason = _verdict(found)
    console.print(f"[bold {_COLOURS.get(said, 'default')}]{said}[/]: {reason}", highlight=False)


def _facts() -> list[tuple[str, Any]]:
    def cosine_at_load(side: dict[str, Any]) -> str:
        found = side["card"]["settings"].get("quantization_cosine")
        return "" if found is None else f" (cosine {found})"

    return [
        ("model", lambda side: side["card"]["name"]),
        ("engine", lambda side: f"{side['card']['engine']} on {side['device']}"),
        ("numbers", lambda side: side["card"]["dtype"]),
        ("weights", lambda side: side["card"]["quantization"] + cosine_at_load(side)),
        ("dimension", lambda side: str(side["card"]["dimension"] or "-")),
    ]


def _numbers(task: str) -> list[tuple[str, str, float, str]]:
    items = "documents a second" if task == "embed" else "pairs a second"
    return [
        (items, "items_per_s", 1, ""),
        ("tokens a second", "tokens_per_s", 1, ""),
        ("start", "start_s", 1, " s"),
        ("step p50", "step_p50_s", 1000, " ms"),
        ("query p50 under bulk", "query_p50_s", 1000, " ms"),
        ("RSS, loaded", "rss_loaded_bytes", 1 / MIB, " MiB"),
        ("RSS, after the work", "rss_bytes", 1 / MIB, " MiB"),
        ("GPU memory", "gpu_bytes", 1 / MIB, " MiB"),
    ]


def _agreement(found: dict[str, Any], task: str) -> str:
    if task == "rerank":
        return (
            f"scores: rank correlation (Spearman) {found['spearman']:.4f}, Pearson "
            f"{found['pearson']:.4f}, apart by at most {found['difference']:.4f}; "
            f"overlap@10 of the order {found['overlap']:.3f}"
        )
    cosine = "cosine: -, the dimensions differ"
    if found["cosine_mean"] is not None:
        cosine = f"cosine: {found['cosine_mean']:.4f} on average, {found['cosine_min']:.4f} least"
    return f"{cosine}; overlap@10 of the neighbours {found['overlap']:.3f}"


def _verdict(found: dict[str, Any]) -> tuple[str, str]:
    said = found["verdict"]
    what = "mean cosine" if found["task"] == "embed" else "rank correlation"
    if said is None:
        return "two models", (
            "their vectors are of two spaces, so the cosine says nothing and neither may be "
            "searched with the other; the overlap says how often they find the same"
        )
    reasons = {
        "kept": f"the {what} is at least 0.95; b may stand for a",
        "acceptable": f"the {what} lies between 0.90 and 0.95; try b on your own questions",
        "not acceptable": f"the {what} is below 0.90; b finds other things than a",
    }
    return said, reasons[said]
