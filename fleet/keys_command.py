"""``vecfleet keys``: make, list and revoke the API keys of a gateway."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vecfleet.common.api_keys import (
    SCOPES,
    ApiKey,
    KeySet,
    add_key,
    check_scopes,
    new_key,
    read_keys,
    remove_key,
)
from vecfleet.common.errors import ConfigError
from vecfleet.common.keys import DEFAULT_TENANT
from vecfleet.common.names import check_tenant
from vecfleet.common.settings import KEYS_FILE, Settings
from vecfleet.fleet.client_options import json_option, print_json

_DURATION = re.compile(r"([1-9]\d{0,5})([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}

_file_option = click.option(
    "--keys-file",
    type=click.Path(path_type=Path),
    help=f"Where the keys are; by default VECFLEET_KEYS_FILE, else {KEYS_FILE} in VECFLEET_DATA.",
)


@click.group()
def keys() -> None:
    """Make, list and revoke the API keys of a gateway, which notices within a second."""


@keys.command()
@click.option(
    "--tenant", default=DEFAULT_TENANT, show_default=True, help="Whose collections it is for."
)
@click.option(
    "--scopes", required=True, metavar="S,S", help=f"What it is for: some of {','.join(SCOPES)}."
)
@click.option("--expires", metavar="90d", help="After how long it ends: 30m, 12h, 90d.")
@click.option("--note", default="", help="Whose it is, for `vecfleet keys list`.")
@_file_option
@json_option
@click.pass_obj
def create(
    settings: Settings,
    tenant: str,
    scopes: str,
    expires: str | None,
    note: str,
    keys_file: Path | None,
    as_json: bool,
) -> int:
    """Make a key and print it, once: only its digest is kept."""
    check_tenant(tenant)
    wanted = check_scopes(part.strip() for part in scopes.split(",") if part.strip())
    expires_at = None if expires is None else int(time.time()) + seconds_of(expires)
    shown, entry = new_key(tenant, wanted, expires_at=expires_at, note=note)
    path = _file(settings, keys_file)
    add_key(path, entry)
    if as_json:
        print_json({"key": shown, **_told(entry)})
        return 0
    click.echo(shown)
    until = "" if expires_at is None else f", until {_day(expires_at)}"
    what = f"{entry.id} of tenant {tenant} for {', '.join(wanted)}{until}"
    click.echo(f"This is key {what}. It is shown this once; {path} has its digest.", err=True)
    return 0


@keys.command(name="list")
@_file_option
@json_option
@click.pass_obj
def list_keys(settings: Settings, keys_file: Path | None, as_json: bool) -> int:
    """Show all keys but what makes them keys."""
    path = _file(settings, keys_file)
    found = read_keys(path) if path.exists() else KeySet()
    if as_json:
        print_json({"keys": [_told(entry) for entry in found.entries]})
    elif found.entries:
        Console().print(_table(found.entries))
    else:
        click.echo(f"there are no keys in {path}")
    return 0


@keys.command()
@click.argument("key_id", metavar="ID")
@_file_option
@click.pass_obj
def revoke(settings: Settings, key_id: str, keys_file: Path | None) -> int:
    """Take a key out of the file: nobody can use it any more."""
    if key_id.startswith("vf_"):
        raise ConfigError("name the key by its id, the 12 digits after vf_: `ps` shows arguments")
    remove_key(_file(settings, keys_file), key_id)
    click.echo(f"revoked {key_id}")
    return 0


def seconds_of(duration: str) -> int:
    """``90d``, ``12h``, ``30m`` or ``45s`` in seconds; raises ``ConfigError``."""
    found = _DURATION.fullmatch(duration)
    if found is None:
        raise ConfigError("--expires is a number and a unit, such as 30m, 12h or 90d")
    return int(found[1]) * _UNIT_S[found[2]]


def _file(settings: Settings, given: Path | None) -> Path:
    return given or settings.keys_file or settings.data / KEYS_FILE


def _told(entry: ApiKey) -> dict[str, Any]:
    told = asdict(entry)
    del told["sha256"]
    return {**told, "expired": entry.is_expired(time.time())}


def _table(entries: tuple[ApiKey, ...]) -> Table:
    table = Table("id", "tenant", "scopes", "made", "ends", "note")
    now = time.time()
    for entry in entries:
        ends = "never" if entry.expires_at is None else _day(entry.expires_at)
        table.add_row(
            entry.id,
            entry.tenant,
            ", ".join(entry.scopes),
            _day(entry.created_at),
            Text(f"{ends} (ended)" if entry.is_expired(now) else ends),
            Text(entry.note),
        )
    return table


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
