"""Who may come in through the gateway: the options that say so, and their check."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click

from vecfleet.common.api_keys import read_keys
from vecfleet.common.settings import Settings
from vecfleet.fleet.engine_options import options

_PATH: Any = click.Path(path_type=Path)
door_options = options(
    click.option("--keys-file", type=_PATH, help="The API keys; see `vecfleet keys`."),
    click.option("--no-keys", is_flag=True, default=None, help="Serve everybody who reaches it."),
    click.option("--tls-cert", type=_PATH, help="Serve HTTPS with this certificate (PEM)."),
    click.option("--tls-key", type=_PATH, help="Its private key."),
)


def check_door(settings: Settings, *, for_oneself: bool = False) -> None:
    """Raise ``ConfigError`` unless a gateway with these settings would start.

    ``for_oneself``: with ``vecfleet up`` it needs no keys on the loopback address.
    """
    config = importlib.import_module("vecfleet.gateway.config")
    keys_file = None if settings.no_keys else settings.find_keys_file()
    is_open = for_oneself and keys_file is None and config.is_loopback(settings.host)
    if keys_file is not None:
        read_keys(keys_file)
    config.GatewayConfig(
        "",
        host=settings.host,
        keys_file=keys_file,
        no_keys=settings.no_keys or is_open,
        tls_cert=settings.tls_cert,
        tls_key=settings.tls_key,
    ).checked()
