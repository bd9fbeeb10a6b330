"""The commands that run a whole fleet on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vecfleet.common.errors import ConfigError
from vecfleet.common.settings import Settings
from vecfleet.fleet.door import check_door, door_options
from vecfleet.fleet.engine_options import engine_options, options
from vecfleet.fleet.installed import need_all
from vecfleet.fleet.roles import niceness_option, with_given

_fleet_options = options(
    click.option("--port", type=click.IntRange(0, 65535), help="The gateway's port."),
    click.option("--model", metavar="M", help="Hub id, directory or package:NAME."),
    click.option("--reranker", metavar="R", help="A model that reranks, named likewise."),
    engine_options,
)


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Where everything is kept.")
@click.option("--host", metavar="ADDRESS", help="The address the gateway listens on.")
@door_options
@_fleet_options
@click.option(
    "--workers", default="auto", show_default=True, help="How many, or auto: one a GPU, else one."
)
@niceness_option
@click.pass_obj
def up(settings: Settings, /, workers: str, niceness: int, host: str | None, **given: Any) -> int:
    """Run Redis, workers, aggregator and gateway on this machine until Ctrl-C, which drains."""
    from vecfleet.fleet.up import FleetOptions, run_up

    chosen = with_given(settings, host=host, **given)
    need_all(chosen.engine)
    check_door(chosen, for_oneself=True)
    if workers != "auto" and not (workers.isdecimal() and int(workers) > 0):
        raise ConfigError("--workers must be a number of at least 1, or auto")
    return run_up(
        FleetOptions(
            settings=chosen,
            workers=None if workers == "auto" else int(workers),
            niceness=niceness,
        )
    )


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=Path(".vecfleet-demo"),
    show_default=True,
    help="Where the collection is kept.",
)
@click.option("--documents", type=click.IntRange(1), help="At most so many passages.")
@click.option(
    "--source",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder of Python packages; by default this environment's.",
)
@_fleet_options
@click.pass_obj
def demo(settings: Settings, /, documents: int | None, source: Path | None, **given: Any) -> int:
    """Ingest the docstrings of the installed Python packages, ask questions, and sum up."""
    given["port"] = given["port"] or 0  # any that is free: nobody has to know it
    chosen = with_given(settings, **given)
    need_all(chosen.engine)
    from vecfleet.fleet.demo import DemoOptions, run_demo

    return run_demo(DemoOptions(chosen, documents, source))
