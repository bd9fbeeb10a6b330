"""``vecfleet dead``: what could not be done, to look at, to try again, and to drop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from vecfleet.common.dead_entry import DeadEntry
from vecfleet.common.dead_letter import DeadLetter
from vecfleet.common.dead_walk import MAX_PAGE, DeadFilter, parse_since
from vecfleet.common.errors import InvalidInput, QueueFull, Unavailable, VecfleetError
from vecfleet.common.fleet_client import FleetClient
from vecfleet.common.keys import DEFAULT_TENANT
from vecfleet.common.settings import Settings
from vecfleet.fleet.client_options import json_option, print_json, redis_option, run_with
from vecfleet.fleet.dead_view import harmless, names_of, row, table, when
from vecfleet.producer.producer import AsyncProducer

_PATIENCE_S = 60.0  # without room for a single one of many
_RETRY_S = 2.0
_F = TypeVar("_F", bound=Callable[..., Any])
_One = Callable[[DeadLetter, str], Awaitable[DeadEntry]]


def _filters(command: _F) -> _F:
    for option in (
        click.option("--collection", "-c", metavar="C", help="Only those of a collection."),
        click.option("--code", metavar="CODE", help="Only those with this error, as poison_text."),
        click.option("--since", metavar="WHEN", help="An ISO time, or 90m, 2h, 3d ago."),
        click.option("--tenant", metavar="T", help="Only a tenant's; by default all."),
    ):
        command = option(command)
    return command


@click.group()
def dead() -> None:
    """Look at what could not be done; try it again, with another text too, or drop it."""


@dead.command("list")
@redis_option
@_filters
@click.option("--limit", "-n", default=50, show_default=True, type=click.IntRange(1))
@json_option
@click.pass_obj
def list_entries(
    settings: Settings, /, redis_url: str | None, limit: int, as_json: bool, **filters: str | None
) -> int:
    """List entries, the newest first: a table on a terminal, else lines with tabs between."""

    async def ask(producer: AsyncProducer) -> tuple[list[DeadEntry], dict[str, str]]:
        fleet = await producer.fleet()
        entries = await _matching(fleet, filters, limit)
        return entries, await names_of(fleet, entries)

    entries, names = run_with(settings, redis_url, ask)
    if as_json:
        wire = [entry.to_wire(names.get(entry.uid, "")) for entry in entries]
        print_json({"entries": wire})
        return 0
    rows = [row(entry, names) for entry in entries]
    console = Console()
    if not console.is_terminal:
        for cells in rows:
            click.echo("\t".join(cells))
    elif rows:
        console.print(table(rows))
    else:
        click.echo("the dead letter is empty")
    return 0


@dead.command()
@click.argument("entry_id", metavar="ID")
@redis_option
@json_option
@click.pass_obj
def show(settings: Settings, entry_id: str, redis_url: str | None, as_json: bool) -> int:
    """Show one entry with its whole texts."""

    async def ask(producer: AsyncProducer) -> tuple[DeadEntry, dict[str, str]]:
        fleet = await producer.fleet()
        entry = await fleet.dead_letter.get(entry_id)
        return entry, await names_of(fleet, [entry])

    entry, names = run_with(settings, redis_url, ask)
    wire = entry.to_wire(names.get(entry.uid, ""))
    if as_json:
        print_json(wire)
        return 0
    documents = wire.pop("documents")
    error = wire.pop("error")
    wire["died_at"] = when(entry)
    for name, value in {**wire, "error": error["code"], "message": error["message"]}.items():
        click.echo(harmless(f"{name}: {value}"))
    for document in documents:
        click.echo(harmless(f"\n{document['id']}\n{document['text'] or ''}"))
    return 0


@dead.command()
@click.argument("entry_ids", metavar="ID...", nargs=-1)
@redis_option
@_filters
@click.option("--all", "is_all", is_flag=True, help="All that the filters leave.")
@click.option("--text", metavar="TEXT", help="Take this text in place of the one that failed.")
@click.option("--text-file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--document", metavar="D", help="Whose text, where an entry holds several.")
@json_option
@click.pass_obj
def retry(
    settings: Settings,
    /,
    entry_ids: tuple[str, ...],
    redis_url: str | None,
    is_all: bool,
    text: str | None,
    text_file: Path | None,
    document: str | None,
    as_json: bool,
    **filters: str | None,
) -> int:
    """Queue entries again, with the versions that they had."""
    if text_file is not None:
        if text is not None:
            raise InvalidInput("give --text or --text-file, not both", field="text")
        text = _read(text_file)
    if text is not None and (is_all or len(entry_ids) != 1):
        raise InvalidInput("--text is for one entry", field="text")

    async def one(letter: DeadLetter, entry_id: str) -> DeadEntry:
        return await letter.retry(entry_id, text=text, document=document)

    picked = _Picked(entry_ids, is_all, filters)
    return _act(settings, redis_url, picked, one, "queued again", as_json)


@dead.command()
@click.argument("entry_ids", metavar="ID...", nargs=-1)
@redis_option
@_filters
@click.option("--all", "is_all", is_flag=True, help="All that the filters leave.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def drop(
    settings: Settings,
    /,
    entry_ids: tuple[str, ...],
    redis_url: str | None,
    is_all: bool,
    yes: bool,
    as_json: bool,
    **filters: str | None,
) -> int:
    """Remove entries and their texts for good."""
    if not yes:
        what = "all entries that match" if is_all else f"{len(entry_ids)} entries"
        click.confirm(f"Drop {what}, with their texts?", abort=True, err=True)

    async def one(letter: DeadLetter, entry_id: str) -> DeadEntry:
        return await letter.drop(entry_id)

    picked = _Picked(entry_ids, is_all, filters)
    return _act(settings, redis_url, picked, one, "dropped", as_json)


class _Picked:
    """The entries that a command is for."""

    def __init__(self, ids: Sequence[str], is_all: bool, filters: dict[str, str | None]) -> None:
        if bool(ids) == is_all:
            raise InvalidInput("name entries, or say --all", field="ID")
        if ids and any(value is not None for value in filters.values()):
            raise InvalidInput("filters go with --all", field="ID")
        self._ids = ids
        self._filters = filters

    async def ids(self, fleet: FleetClient) -> list[str]:
        """All of them, before anything is done: what fails again must not come round."""
        if self._ids:
            return list(self._ids)
        found: list[str] = []
        async for page in _pages(fleet, self._filters, None, texts=False):
            found += [entry.id for entry in page]
        return found


def _act(
    settings: Settings,
    redis_url: str | None,
    picked: _Picked,
    one: _One,
    what: str,
    as_json: bool,
) -> int:
    """Do ``one`` to each entry; a single one's error is raised, of many each is told."""
    done: list[str] = []
    failed: dict[str, VecfleetError] = {}

    async def ask(producer: AsyncProducer) -> VecfleetError | None:
        """What stopped it, if anything did before all was done."""
        fleet = await producer.fleet()
        ids = await picked.ids(fleet)
        for entry_id in ids:
            try:
                patience_s = _PATIENCE_S if len(ids) > 1 else 0.0
                await _patiently(one, fleet.dead_letter, entry_id, patience_s)
                done.append(entry_id)
            except (QueueFull, Unavailable) as error:
                if not done and not failed:
                    raise
                return error
            except VecfleetError as error:
                if len(ids) == 1:
                    raise
                failed[entry_id] = error
        return None

    stopped = run_with(settings, redis_url, ask)
    if as_json:
        errors = {entry_id: error.to_wire() for entry_id, error in failed.items()}
        print_json({"done": done, "failed": errors})
    else:
        for entry_id, error in failed.items():
            click.echo(f"{entry_id}: {error}", err=True)
        click.echo(f"{what}: {len(done)}")
    if stopped is not None:
        raise stopped
    return 1 if failed else 0


async def _patiently(one: _One, letter: DeadLetter, entry_id: str, patience_s: float) -> None:
    """Do it, again and again while the queue is full; raises ``QueueFull`` in the end."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            await one(letter, entry_id)
            return
        except QueueFull as error:
            pause_s = min(error.retry_after_s or _RETRY_S, _RETRY_S)
            if time.monotonic() + pause_s > deadline:
                raise
            await asyncio.sleep(pause_s)


async def _matching(
    fleet: FleetClient, filters: dict[str, str | None], limit: int
) -> list[DeadEntry]:
    return [entry async for page in _pages(fleet, filters, limit) for entry in page]


async def _pages(
    fleet: FleetClient, filters: dict[str, str | None], limit: int | None, *, texts: bool = True
) -> AsyncIterator[Sequence[DeadEntry]]:
    tenant, collection, since = filters["tenant"], filters["collection"], filters["since"]
    uid = None
    if collection is not None:
        uid = (await fleet.collection(collection, tenant=tenant or DEFAULT_TENANT)).uid
    wanted = DeadFilter(tenant, uid, filters["code"], None if since is None else parse_since(since))
    count, cursor = 0, ""
    while limit is None or count < limit:
        most = MAX_PAGE if limit is None else min(MAX_PAGE, limit - count)
        page = await fleet.dead_letter.page(wanted, cursor=cursor, limit=most, texts=texts)
        count += len(page.entries)
        yield page.entries
        cursor = page.cursor
        if not cursor:
            break


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path} cannot be read as text: {error}", field="text") from None
