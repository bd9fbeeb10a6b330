"""``vecfleet status`` and ``vecfleet collections``: what there is and how it fares."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vecfleet.common.collection import Collection, IndexPolicy, VersionMode
from vecfleet.common.fleet_state import LineLoad, QueueLoad
from vecfleet.common.keys import LANES
from vecfleet.common.settings import Settings
from vecfleet.fleet.client_options import json_option, print_json, redis_option, run_with
from vecfleet.producer.found import CollectionStatus, FleetStatus
from vecfleet.producer.producer import AsyncProducer


@click.command()
@redis_option
@json_option
@click.pass_obj
def status(settings: Settings, redis_url: str | None, as_json: bool) -> int:
    """Show models, workers, queues, collections and submissions under way."""
    found = run_with(settings, redis_url, AsyncProducer.status)
    if as_json:
        print_json({**_wire(found), "redis": _memory(found, settings)})
        return 0
    console = Console()
    _show(
        console,
        "Models",
        ("model", "does", "engine", "dimension", "workers"),
        [
            (m.card.name, "+".join(m.card.tasks), m.card.engine, m.card.dimension, len(m.workers))
            for m in found.models
        ],
    )
    _show(
        console,
        "Workers",
        ("worker", "state", "tokens/s", "why paused"),
        [
            (
                w.name,
                w.fields.get("state", ""),
                f"{w.tokens_per_s:,.0f}",
                w.paused,
            )
            for w in found.state.workers
        ],
    )
    _show(
        console,
        "Queues",
        ("queue", "jobs", "tokens", "MiB", "running", "dead", "parked"),
        [
            (*_load(q), q.in_flight, q.dead, q.parked)
            for q in found.state.queues
            if q.jobs or q.in_flight or q.dead or q.parked
        ],
    )
    if found.state.queues_left_out:
        console.print(f"and {found.state.queues_left_out} queues more")
    _show(
        console,
        "All tenants",
        ("line", "jobs", "tokens", "MiB", "tenants"),
        [(*_load(line), line.tenants or "") for line in found.state.lines if line.jobs],
    )
    _show(
        console,
        "Dead letter",
        ("tenant", "MiB"),
        [(tenant, f"{size / 2**20:.1f}") for tenant, size in found.state.dead_bytes.items()],
    )
    _show_memory(console, _memory(found, settings))
    _show(console, "Collections", _COLLECTION_COLUMNS, [_row(c) for c in found.collections])
    _show(
        console,
        "Submissions under way",
        ("submission", "collection", "state", "committed", "failed", "of"),
        [
            (s.id, s.collection, s.state, s.committed, s.failed, s.documents or "?")
            for s in found.submissions
        ],
    )
    return 0


@click.group()
def collections() -> None:
    """List, create and delete collections."""


@collections.command("list")
@redis_option
@json_option
@click.pass_obj
def list_collections(settings: Settings, redis_url: str | None, as_json: bool) -> int:
    """All collections."""
    found = run_with(settings, redis_url, AsyncProducer.status).collections
    if as_json:
        print_json([_collection_wire(entry) for entry in found])
    elif found:
        Console().print(_table(_COLLECTION_COLUMNS, [_row(entry) for entry in found]))
    else:
        click.echo("no collections")
    return 0


@collections.command()
@click.argument("name")
@redis_option
@click.option("--model", metavar="M", help="The model, where several are served.")
@click.option("--policy", type=click.Choice(get_args(IndexPolicy)), default="auto")
@click.option("--recall", default=0.98, show_default=True, type=click.FloatRange(0.5, 1))
@click.option("--versions", type=click.Choice(get_args(VersionMode)), default="assigned")
@click.option(
    "--dimensions",
    type=click.IntRange(1),
    metavar="N",
    help="Cut the vectors, where the model is trained for it.",
)
@json_option
@click.pass_obj
def create(
    settings: Settings,
    name: str,
    redis_url: str | None,
    model: str | None,
    policy: str,
    recall: float,
    versions: str,
    dimensions: int | None,
    as_json: bool,
) -> int:
    """Create a collection; one that is there already in the same way is left as it is."""

    async def ask(producer: AsyncProducer) -> Collection:
        return await producer.create_collection(
            name,
            model=model,
            policy=policy,
            recall_target=recall,
            versions=versions,
            dimensions=dimensions,
        )

    made = run_with(settings, redis_url, ask)
    if as_json:
        print_json(made.to_wire())
    else:
        click.echo(f"collection {made.name} for {made.spec.model} ({made.spec.dimension})")
    return 0


@collections.command()
@click.argument("name")
@redis_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def delete(settings: Settings, name: str, redis_url: str | None, yes: bool) -> int:
    """Delete a collection with all its documents."""
    if not yes:
        click.confirm(f"Delete collection {name} and all its documents?", abort=True, err=True)
    run_with(settings, redis_url, lambda producer: producer.delete_collection(name))
    click.echo(f"deleted {name}")
    return 0


def _load(of: QueueLoad | LineLoad) -> tuple[object, ...]:
    name = of.queue if isinstance(of, QueueLoad) else of.line
    return name, of.jobs, f"{of.tokens:,}", f"{of.bytes / 2**20:.1f}"


def _memory(found: FleetStatus, settings: Settings) -> dict[str, int] | None:
    """What Redis holds, may hold, and would hold if all that the limits let wait did wait."""
    if found.memory is None:
        return None
    pools = {(task, model.card.space) for model in found.models for task in model.card.tasks}
    limits_bytes = settings.admission().most_bytes(len(pools) * len(LANES))
    return {**asdict(found.memory), "limits_bytes": limits_bytes}


def _show_memory(console: Console, memory: dict[str, int] | None) -> None:
    if memory is None:
        return
    used, most, let = (memory[f"{name}_bytes"] / 2**20 for name in ("used", "max", "limits"))
    row = (f"{used:,.1f}", f"{most:,.0f}" if most else "none", f"{let:,.0f}")
    _show(console, "Redis", ("MiB", "maxmemory", "limits let wait"), [row])
    if not most:
        console.print("  without maxmemory Redis takes what it gets: set it (docs/redis.md)")
    elif let > most:
        console.print(
            "  the limits let more wait than maxmemory: Redis may be full before a queue is, and "
            "what workers hand on may pass maxmemory (docs/redis.md)",
            soft_wrap=True,
        )


_COLLECTION_COLUMNS = ("collection", "model", "documents", "segments", "MiB")


def _row(entry: CollectionStatus) -> tuple[object, ...]:
    named = (entry.collection.name, entry.collection.spec.model)
    if entry.stats is None:
        return (*named, "?", "?", "?")
    stats = entry.stats
    size = f"{stats['bytes'] / 2**20:,.1f}"
    return (*named, f"{stats['documents']:,}", stats["segments"], size)


def _show(console: Console, title: str, columns: tuple[str, ...], rows: list[Any]) -> None:
    console.print(Text(title, style="bold"))
    console.print(_table(columns, rows) if rows else "  none")


def _table(columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> Table:
    table = Table(box=None, pad_edge=True)
    for place, column in enumerate(columns):
        is_number = bool(rows) and not any(c.isalpha() for c in str(rows[0][place]))
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    return table


def _collection_wire(entry: CollectionStatus) -> dict[str, Any]:
    return {**entry.collection.to_wire(), "stats": entry.stats}


def _wire(found: FleetStatus) -> dict[str, Any]:
    return {
        "models": [
            {**m.card.to_wire(), "workers": m.workers, "last_seen_ms": m.last_seen_ms}
            for m in found.models
        ],
        "workers": [{"name": w.name, **w.fields} for w in found.state.workers],
        "queues": [asdict(queue) for queue in found.state.queues],
        "queues_left_out": found.state.queues_left_out,
        "lines": [asdict(line) for line in found.state.lines],
        "collections": [_collection_wire(entry) for entry in found.collections],
        "submissions": [asdict(submission) for submission in found.submissions],
    }
