"""What the client's commands share: the Redis option, the settings, running a coroutine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click

from vecfleet.common.settings import Settings
from vecfleet.producer.producer import AsyncProducer

F = TypeVar("F", bound=Callable[..., Any])
_T = TypeVar("_T")

JOURNALS = "journals"  # in the data folder
REJECTS = "rejects"  # likewise

redis_option = click.option(
    "--redis", "redis_url", metavar="URL", help="The fleet's Redis; by default VECFLEET_REDIS_URL."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Answer with JSON.")


def connected(settings: Settings, redis_url: str | None) -> AsyncProducer:
    """A producer for the fleet that the settings and the option name."""
    changes: dict[str, object] = {} if redis_url is None else {"redis_url": redis_url}
    chosen = Settings.checked({**settings.model_dump(), **changes})
    return AsyncProducer(
        chosen.find_redis_url(),
        admission=chosen.admission(),
        timeout_s=chosen.timeout_s,
        journal_dir=chosen.data / JOURNALS,
    )


def run_with(
    settings: Settings,
    redis_url: str | None,
    work: Callable[[AsyncProducer], Coroutine[Any, Any, _T]],
) -> _T:
    """Run ``work`` with a producer; raises what it raises."""

    async def main() -> _T:
        async with connected(settings, redis_url) as producer:
            return await work(producer)

    return asyncio.run(main())


def print_json(value: Any) -> None:
    """One JSON object on one line of standard output."""
    click.echo(json.dumps(value, ensure_ascii=False, default=str))
