"""What the commands of all roles share: options, settings, and how a role is started."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import click

from vecfleet.common.settings import Settings, redact_url
from vecfleet.fleet.engine_options import options

log = logging.getLogger(__name__)

DEFAULT_NICENESS = 10

role_options = options(
    click.option("--redis", "redis_url", metavar="URL", help="The fleet's Redis."),
    click.option("--check", is_flag=True, help="Check settings and installation, and end."),
)
niceness_option = click.option(
    "--niceness",
    default=DEFAULT_NICENESS,
    show_default=True,
    type=click.IntRange(0, 19),
    help="How far workers and the index's writer stand back, so that searches go first.",
)


def with_given(settings: Settings, **given: object) -> Settings:
    """``settings`` with the options that were given on the command line on top.

    Raises ``ConfigError`` that names a bad one.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    checked = Settings.checked({**settings.model_dump(), **chosen})
    if "redis_url" in chosen and _has_password(str(checked.redis_url)):
        log.warning(
            "ps shows the password in --redis to everybody on this machine; put it into a file "
            "(VECFLEET_REDIS_PASSWORD_FILE), or the URL into VECFLEET_REDIS_URL"
        )
    return checked


def _has_password(url: str) -> bool:
    parts = urlsplit(url)
    return bool(parts.password) or "password" in parse_qs(parts.query)


@dataclass(frozen=True, slots=True)
class Role:
    """What runs it, by name: it is imported when it is started."""

    module: str
    config: str
    function: str


def run_role(role: Role, make: Callable[[Any], Any], redis_url: str, check: bool) -> int:
    """Start a role with the config that ``make`` makes of its class, or only ``check`` that."""
    module = importlib.import_module(role.module)
    config = make(getattr(module, role.config))
    if check:
        click.echo(f"settings and installation are good; Redis at {redact_url(redis_url)}")
        return 0
    return int(getattr(module, role.function)(config) or 0)
