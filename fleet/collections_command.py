"""``vecfleet collections``: list, create and delete."""

from __future__ import annotations

from typing import get_args

import click
from rich.console import Console

from vecfleet.common.collection import Collection, IndexPolicy, VersionMode
from vecfleet.common.settings import Settings
from vecfleet.fleet.client_options import json_option, print_json, redis_option, run_with
from vecfleet.fleet.collection_view import COLLECTION_COLUMNS, collection_json, collection_row
from vecfleet.fleet.tables import table_of
from vecfleet.producer.producer import AsyncProducer


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
        print_json([collection_json(entry) for entry in found])
    elif found:
        Console().print(table_of(COLLECTION_COLUMNS, [collection_row(entry) for entry in found]))
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
