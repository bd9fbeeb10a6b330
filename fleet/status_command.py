"""``vecfleet status``: what there is and how it fares."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from vecfleet.common.fleet_state import LineLoad, QueueLoad
from vecfleet.common.keys import LANES
from vecfleet.common.settings import Settings
from vecfleet.fleet.client_options import json_option, print_json, redis_option, run_with
from vecfleet.fleet.collection_view import COLLECTION_COLUMNS, collection_json, collection_row
from vecfleet.fleet.tables import table_of
from vecfleet.producer.found import FleetStatus
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
    _show_work(console, found)
    _show_memory(console, _memory(found, settings))
    _show_documents(console, found)
    return 0


def _show_work(console: Console, found: FleetStatus) -> None:
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


def _show_documents(console: Console, found: FleetStatus) -> None:
    _show(
        console, "Collections", COLLECTION_COLUMNS, [collection_row(c) for c in found.collections]
    )
    _show(
        console,
        "Submissions under way",
        ("submission", "collection", "state", "committed", "failed", "of"),
        [
            (s.id, s.collection, s.state, s.committed, s.failed, s.documents or "?")
            for s in found.submissions
        ],
    )


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


def _show(console: Console, title: str, columns: tuple[str, ...], rows: list[Any]) -> None:
    console.print(Text(title, style="bold"))
    console.print(table_of(columns, rows) if rows else "  none")


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
        "collections": [collection_json(entry) for entry in found.collections],
        "submissions": [asdict(submission) for submission in found.submissions],
    }
