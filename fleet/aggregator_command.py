"""The command that runs the index's writer and its search process."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import click

from vecfleet.common.settings import Settings, set_process_env
from vecfleet.fleet.installed import need
from vecfleet.fleet.roles import Role, niceness_option, role_options, run_role, with_given

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@click.command()
@role_options
@click.option("--data", type=click.Path(path_type=Path), help="The index's folder, a local disk.")
@click.option("--home", default="main", show_default=True, help="This aggregator's name.")
@click.option(
    "--only",
    type=click.Choice(["writer", "search"]),
    help="Run one of the two processes; by default both.",
)
@niceness_option
@click.pass_obj
def aggregator(
    settings: Settings,
    redis_url: str | None,
    check: bool,
    data: Path | None,
    home: str,
    only: str | None,
    niceness: int,
) -> int:
    """Run the index's writer and its read-only search process, which never stands back."""
    need("aggregator", "numpy", "faiss")
    chosen = with_given(settings, redis_url=redis_url, data=data)
    url = chosen.find_redis_url()
    if only is None and not check:
        return _run_both(chosen, url, home, niceness)

    def writer_config(cls: Any) -> Any:
        return cls(
            redis_url=url,
            data_dir=chosen.data,
            home=home,
            dead_ttl_s=chosen.dead_ttl_s,
            max_merge_bytes=chosen.max_merge_bytes,
            max_unmerged_bytes=chosen.max_unmerged_bytes,
            max_collections=chosen.max_collections,
        )

    def search_config(cls: Any) -> Any:
        return cls(redis_url=url, data_dir=chosen.data, home=home)

    if only == "search":
        # Searches run one after the other. A second thread of theirs would gain little, and where
        # its core is busy the first one spins until it has come round: a hundred milliseconds.
        for name in _THREADS:
            set_process_env(name, "1")
        role = Role("vecfleet.worker.search_main", "SearchConfig", "run_search")
        return run_role(role, search_config, url, check)
    if not check:
        os.nice(niceness)
    role = Role("vecfleet.worker.aggregator_main", "AggregatorConfig", "run_aggregator")
    return run_role(role, writer_config, url, check)


def _run_both(settings: Settings, redis_url: str, home: str, niceness: int) -> int:
    from vecfleet.fleet.process import role_command
    from vecfleet.fleet.supervisor import ChildSpec, run_children

    environment = settings.environment(redis_url=redis_url, data=str(settings.data))
    given = ("--home", home, "--niceness", str(niceness))
    children = [
        ChildSpec(
            name,
            tuple(role_command("aggregator", "--only", name, *given)),
            environment=environment,
        )
        for name in ("search", "writer")  # stopped in the reverse order
    ]
    return asyncio.run(run_children(children))
