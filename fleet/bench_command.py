"""``vecfleet bench engine``: measures which sizes of steps suit a model on this machine."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import psutil
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vecfleet.common.errors import ConfigError
from vecfleet.common.settings import Settings
from vecfleet.fleet.client_options import json_option, print_json
from vecfleet.fleet.engine_options import engine_options, engine_settings
from vecfleet.fleet.engine_probe import ProbeTask
from vecfleet.fleet.sample import pairs_of, queries_of, sample_texts
from vecfleet.fleet.sweep import GOALS, Point, Refused, Sweep, choose, grid, run_sweep
from vecfleet.worker.machine import read_gpus, read_machine
from vecfleet.worker.measured_settings import (
    Measured,
    device_name,
    key_of,
    number_name,
    write_measured,
)
from vecfleet.worker.model_files import find_directory, fingerprint

COMMAND = "vecfleet bench engine"
CPU_TOKENS, CPU_TEXTS = (512, 1024, 2048, 4096), (8, 32, 128)
GPU_TOKENS, GPU_TEXTS = (4096, 8192, 16_384, 32_768), (32, 128, 512)
CPU_ITEMS, GPU_ITEMS = 256, 8192  # texts, or pairs, of a round
RERANK_QUERIES = 8
INTERACTIVE_QUERIES = 16
BUSY_PERCENT, BUSY_LOOK_S = 20, 1.0  # of the CPU before anything is measured
MIB = 1 << 20


class Numbers(click.ParamType):  # type: ignore[type-arg]  # generic in stubs only
    """Whole numbers with commas between them, at least 1 each."""

    name = "N,N,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """``"512,1024"`` to ``(512, 1024)``."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",") if part.strip()]
        if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is no list of whole numbers such as 512,1024", param, ctx)
        return tuple(int(part) for part in parts)


@click.group()
def bench() -> None:
    """Measure what suits this machine."""


@bench.command()
@click.option("--model", metavar="M", help="Hub id, directory or package:NAME.")
@engine_options
@click.option("--task", type=click.Choice(["embed", "rerank"]), default="embed", show_default=True)
@click.option("--tokens", type=Numbers(), help="Tokens of a step to try.")
@click.option("--texts", type=Numbers(), help="Texts of a step to try.")
@click.option(
    "--sample",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A file of documents, as ingest reads it; by default the docstrings installed here.",
)
@click.option("--documents", type=click.IntRange(2), help="Of the sample; 256, on a GPU 8,192.")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Over the sample; the fastest counts.",
)
@click.option("--data", type=click.Path(path_type=Path), help="Where --apply writes.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(),
    show_default="this folder",
    help="Where engine-bench.json and engine-bench.png go.",
)
@click.option("--apply", "goal", type=click.Choice(GOALS), help="Have workers use what is best.")
@json_option
@click.pass_obj
def engine(
    settings: Settings,
    /,
    task: str,
    tokens: tuple[int, ...] | None,
    texts: tuple[int, ...] | None,
    sample: Path | None,
    documents: int | None,
    rounds: int,
    out: Path,
    goal: str | None,
    as_json: bool,
    **given: Any,
) -> int:
    """Try an engine with steps of different sizes: throughput, latency, memory.

    Each size runs in a process of its own. Writes the figures as JSON and as a plot, and says
    which sizes suit speed and which suit memory; --apply notes them in the data folder, where
    workers look for what they were not told.
    """
    draw = _plotter()
    chosen = Settings.checked(
        {**settings.model_dump(), **{name: v for name, v in given.items() if v is not None}}
    )
    if chosen.engine in ("fake", "null"):
        raise ConfigError(f"the {chosen.engine} engine has nothing to measure")
    on_gpu = chosen.device != "cpu" and bool(read_gpus())
    sizes = list(
        grid(
            tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS),
            texts or (GPU_TEXTS if on_gpu else CPU_TEXTS),
        )
    )
    count = documents or (GPU_ITEMS if on_gpu else CPU_ITEMS)
    console = Console(stderr=True)
    if (busy := psutil.cpu_percent(BUSY_LOOK_S)) > BUSY_PERCENT:
        console.print(f"other processes use {busy:.0f}% of the CPU: figures will be off")
    with console.status("") as status:

        def say(found: Point | Refused) -> None:
            console.print(_line(found), highlight=False)

        status.update(f"{task}: {len(sizes)} sizes of steps, one after the other")
        work = replace(_task(chosen, task, sample, count), rounds=rounds)
        sweep = run_sweep(work, sizes, say)
    out.mkdir(parents=True, exist_ok=True)
    told = {**sweep.to_wire(), "by": _by(), "at": _now(), "documents": count}
    (out / "engine-bench.json").write_text(json.dumps(told, indent=2) + "\n", "utf-8")
    draw(sweep, out / "engine-bench.png")
    if as_json:
        print_json(told)
    else:
        _show(sweep)
        click.echo(f"written to {out / 'engine-bench.json'} and {out / 'engine-bench.png'}")
    if goal is not None:
        path = apply(sweep, chosen, goal)
        click.echo(f"workers with data in {path.parent} use the settings for {goal}", err=as_json)
    return 0


def apply(sweep: Sweep, settings: Settings, goal: str) -> Path:
    """Write what is best for ``goal`` where workers of this model on this device look."""
    best = choose(sweep.points, goal)
    folder = find_directory(settings.model)
    device = device_name(sweep.device, read_machine())
    measured = Measured(
        settings={
            "max_num_batched_tokens": best.max_num_batched_tokens,
            "max_num_seqs": best.max_num_seqs,
        },
        model=settings.model,
        task=sweep.task,
        goal=goal,
        by=_by(),
        at=_now(),
    )
    card = sweep.card
    numbers = number_name(str(card["dtype"]), str(card["quantization"]))
    key = key_of(fingerprint(folder), device, str(card["engine"]), numbers)
    return write_measured(settings.data, key, measured)


def _task(settings: Settings, task: str, sample: Path | None, count: int) -> ProbeTask:
    # What was measured before must not stand in for what is measured now.
    options = {**asdict(engine_settings(settings)), "data": None}
    if task == "embed":
        texts = sample_texts(sample, count)
        return ProbeTask(options, texts=texts, queries=queries_of(texts, INTERACTIVE_QUERIES))
    texts = sample_texts(sample, max(2, count // RERANK_QUERIES))
    queries = queries_of(texts, RERANK_QUERIES)
    return ProbeTask(options, pairs=pairs_of(queries, texts), queries=queries)


def _plotter() -> Any:
    try:
        from vecfleet.fleet.sweep_plot import draw
    except ImportError as error:
        raise ConfigError(
            f"{error.name} not installed; get it with: pip install 'vecfleet[bench]'"
        ) from error
    return draw


def _line(found: Point | Refused) -> str:
    size = f"{found.max_num_batched_tokens:>6,} tokens, {found.max_num_seqs:>4} texts"
    if isinstance(found, Refused):
        return f"{size}: not run: {found.reason[:200]}"
    return f"{size}: {found.items_per_s:,.1f}/s, a query in {found.query_p50_s * 1000:,.0f} ms"


def _show(sweep: Sweep) -> None:
    items = "texts" if sweep.task == "embed" else "pairs"
    last, of = ("share", "of best") if sweep.task == "embed" else ("agree-", "ment")
    marks = {choose(sweep.points, goal): goal for goal in reversed(GOALS)}
    title = f"{sweep.card['name']}, {sweep.card['engine']} on {sweep.device}"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    units = ("", "", "/s", "/s", "ms", "ms", "MiB", of, "for")
    names = ("tokens", "texts", items, "tokens", "step", "query", "memory", last, "best")
    for name, unit in zip(names, units, strict=True):
        head = f"{name}\n{unit}".strip()
        table.add_column(head, justify="left" if name == "best" else "right", no_wrap=True)
    same = choose(sweep.points, "speed") == choose(sweep.points, "memory")
    for point in sweep.points:
        share = point.efficiency if sweep.task == "embed" else point.agreement
        table.add_row(
            f"{point.max_num_batched_tokens:,}",
            f"{point.max_num_seqs:,}",
            f"{point.items_per_s:,.1f}",
            f"{point.tokens_per_s:,.0f}",
            f"{point.step_p50_s * 1000:,.0f}",
            f"{point.query_p50_s * 1000:,.0f}",
            f"{point.memory_bytes / MIB:,.0f}",
            f"{share:.3f}",
            ("both" if same else marks[point]) if point in marks else "",
        )
    console = Console()
    console.print(table)
    for goal in GOALS:
        best = choose(sweep.points, goal)
        console.print(
            f"for {goal}: --max-num-batched-tokens {best.max_num_batched_tokens} "
            f"--max-num-seqs {best.max_num_seqs}",
            highlight=False,
        )


def _by() -> str:
    return f"{COMMAND} {importlib.metadata.version('vecfleet')} on {platform.node()}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
