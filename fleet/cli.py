"""The ``vecfleet`` command.

Each subcommand is imported when it is called, so that a machine with the producer alone can run the
producer's commands, and ``--help`` is quick.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import click

from vecfleet.common.errors import (
    ConfigError,
    Conflict,
    DeadlineExceeded,
    InvalidInput,
    NotFound,
    QueueFull,
    Unavailable,
    VecfleetError,
)
from vecfleet.common.logs import setup_logging
from vecfleet.common.settings import Settings

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_TRY_AGAIN, EXIT_NOT_FOUND = 0, 1, 2, 3, 4
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class _Lazy:
    module: str
    attribute: str
    help: str
    extra: str | None = None  # what to install where its module's imports are missing


_LOCAL, _QUERY = "vecfleet.fleet.local_commands", "vecfleet.fleet.query_commands"
_WORKER = "vecfleet.fleet.worker_command"
COMMANDS: dict[str, _Lazy] = {
    "up": _Lazy(_LOCAL, "up", "Run a whole fleet on this machine until Ctrl-C."),
    "demo": _Lazy(_LOCAL, "demo", "Ingest real passages, ask questions, and show what it does."),
    "gateway": _Lazy("vecfleet.fleet.gateway_command", "gateway", "Run the HTTP gateway."),
    "worker": _Lazy(_WORKER, "worker", "Run one model on one device."),
    "aggregator": _Lazy(
        "vecfleet.fleet.aggregator_command",
        "aggregator",
        "Run the index's writer and its search process.",
    ),
    "compare": _Lazy(
        "vecfleet.fleet.compare",
        "compare",
        "Run two models or settings over the same texts.",
        "worker",
    ),
    "bench": _Lazy(
        "vecfleet.fleet.bench_command", "bench", "Measure what suits this machine.", "worker"
    ),
    "health": _Lazy(_WORKER, "health", "Tell whether this host's workers show themselves."),
    "keys": _Lazy("vecfleet.fleet.keys_command", "keys", "Make, list and revoke API keys."),
    "ingest": _Lazy(
        "vecfleet.fleet.ingest_command", "ingest", "Put documents from files into a collection."
    ),
    "search": _Lazy(_QUERY, "search", "Find the documents of a collection nearest to a query."),
    "rerank": _Lazy(_QUERY, "rerank", "Order documents by their relevance to a query."),
    "embed": _Lazy(_QUERY, "embed", "Turn texts into vectors."),
    "collections": _Lazy(
        "vecfleet.fleet.collections_command", "collections", "List, create and delete collections."
    ),
    "dead": _Lazy(
        "vecfleet.fleet.dead_command",
        "dead",
        "See what could not be done; try it again or drop it.",
    ),
    "status": _Lazy(
        "vecfleet.fleet.status_command", "status", "Show models, workers, queues and collections."
    ),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All commands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        lazy = COMMANDS.get(cmd_name)
        if lazy is None:
            return None
        try:
            command = getattr(importlib.import_module(lazy.module), lazy.attribute)
        except ModuleNotFoundError as error:
            if lazy.extra is None or (error.name or "").startswith("vecfleet"):
                raise
            raise ConfigError(
                f"{error.name} not installed; get it with: pip install 'vecfleet[{lazy.extra}]'"
            ) from error
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.help) for name, lazy in COMMANDS.items()])


def _show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"vecfleet {importlib.metadata.version('vecfleet')}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong use or input, 3 try again later, 4 not found.",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version)
@click.option("--debug", is_flag=True, help="Show debug lines, and where an error comes from.")
@click.option(
    "--log-format",
    type=click.Choice(["auto", "text", "json"]),
    help="auto: text on a terminal, JSON lines otherwise.",
)
@click.pass_context
def cli(ctx: click.Context, debug: bool, log_format: str | None) -> None:
    """A worker fleet that embeds and reranks text and keeps the vectors searchable.

    Every setting can also be given as a variable VECFLEET_NAME, such as VECFLEET_REDIS_URL.
    """
    settings = Settings.read()
    changes: dict[str, object] = {}
    if debug:
        changes["log_level"] = "debug"
    if log_format:
        changes["log_format"] = log_format
    settings = settings.model_copy(update=changes)
    setup_logging(settings.log_level, log_format=settings.log_format)
    ctx.obj = settings


def exit_code_of(error: VecfleetError) -> int:
    """The exit code that tells a program what kind of error it was."""
    if isinstance(error, InvalidInput | ConfigError | Conflict):
        return EXIT_USAGE
    if isinstance(error, NotFound):
        return EXIT_NOT_FOUND
    if isinstance(error, QueueFull | Unavailable | DeadlineExceeded):
        return EXIT_TRY_AGAIN
    return EXIT_FAILED


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; errors are printed, not raised."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = cli.main(args, prog_name="vecfleet", standalone_mode=False)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return EXIT_INTERRUPTED
    except VecfleetError as error:
        if logging.root.isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        click.echo(f"vecfleet: {error}", err=True)
        return exit_code_of(error)
    return result if isinstance(result, int) else EXIT_OK


def main() -> None:
    """The console script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
