"""``python -m vecfleet.bench``: measure what the project promises, on this machine.

Writes a JSON file, ``{"<key>": {"value", "target", "ok", "detail"}}``, and prints a table. Every
measurement starts a fleet of its own, as ``vecfleet up`` runs it, on real processes.
"""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from vecfleet.bench import (
    growth,
    null_pipeline,
    real_engine,
    recall,
    report,
    search_load,
    vllm_suite,
)
from vecfleet.bench.context import QUICK, Bench, Sizes
from vecfleet.bench.targets import BY_KEY, Measured
from vecfleet.common.errors import VecfleetError
from vecfleet.common.settings import DEFAULT_MODEL

Measure = Callable[[Bench, set[str]], Awaitable[dict[str, Measured]]]

# These run where vLLM is installed, by themselves: `make bench` has an environment for it.
VLLM_KEYS = frozenset(("vllm_fleet_efficiency", "vllm_interactive_ratio", "engine_agreement"))

SUITES: tuple[tuple[Measure, frozenset[str]], ...] = (
    (
        real_engine.measure,
        frozenset(
            (
                "fleet_efficiency",
                "http_efficiency",
                "engine_vs_plain",
                "http_overhead_p50_ms",
                "single_requests_per_s",
                "interactive_p99_steps",
                "bulk_share_under_interactive",
            )
        ),
    ),
    (null_pipeline.measure, frozenset(("null_engine_docs_per_s",))),
    (vllm_suite.measure, VLLM_KEYS),
    (recall.measure, frozenset(("ivf_recall_at_10",))),
    (search_load.measure, frozenset(("search_p99_ratio",))),
    (growth.measure, frozenset(("anon_memory_growth", "ingest_flatness"))),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", metavar="KEY,KEY", help="Measure these; the others keep their entries.")
@click.option("--quick", is_flag=True, help="Small sizes, to try the bench; proves nothing.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The file to write  [default: build/bench.json, quick: build/bench-quick.json]",
)
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="The model that embeds.")
@click.option("--repetitions", type=click.IntRange(1), help="Of each ratio; by default 5.")
@click.option("--keep", is_flag=True, help="Keep the fleets' data and logs.")
def main(
    only: str | None,
    quick: bool,
    out: Path | None,
    model: str,
    repetitions: int | None,
    keep: bool,
) -> None:
    """Measure what the project promises; the exit code is 1 when a promise is not kept."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    here = VLLM_KEYS if has_vllm else BY_KEY.keys() - VLLM_KEYS
    keys = set(only.split(",")) if only else set(here)
    if unknown := keys - BY_KEY.keys():
        raise click.UsageError(
            f"no key {', '.join(sorted(unknown))}; there are {', '.join(BY_KEY)}"
        )
    if keys & VLLM_KEYS and not has_vllm:
        raise click.UsageError(f"{', '.join(VLLM_KEYS)} need vLLM; make bench installs it apart")
    path = out or Path("build") / ("bench-quick.json" if quick else "bench.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir=path.parent))

    def say(line: str) -> None:
        console.print(f"[dim]{line}[/]", highlight=False)

    sizes = QUICK if quick else Sizes()
    if repetitions is not None:
        sizes = replace(sizes, repetitions=repetitions)
    bench = Bench(folder, sizes, model, say)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: in order
    try:
        entries = asyncio.run(_run(bench, keys, path, valid=not quick))
    except VecfleetError as error:
        raise click.ClickException(error.message) from error
    finally:
        if keep:
            say(f"data and logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    report.show(entries, Console())
    print(f"written to {path}")
    sys.exit(any(entries[key]["ok"] is False for key in keys))


async def _run(bench: Bench, keys: set[str], path: Path, *, valid: bool) -> dict[str, Any]:
    """Run the suites that ``keys`` need; each one's figures are written as soon as it is done."""
    entries: dict[str, Any] = {}
    for measure, offered in SUITES:
        if wanted := keys & offered:
            measured = await measure(bench, set(wanted))
            entries = report.write(
                path,
                {
                    key: report.entry_of(key, value, valid=valid)
                    for key, value in measured.items()
                    if key in wanted
                },
            )
    return entries


if __name__ == "__main__":
    main()
