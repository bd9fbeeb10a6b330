"""The commands that run workers and tell whether they live."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from vecfleet.common.errors import ConfigError
from vecfleet.common.settings import Settings
from vecfleet.fleet.engine_options import engine_options, engine_settings
from vecfleet.fleet.installed import need_engine
from vecfleet.fleet.machine import claimed_gpu
from vecfleet.fleet.presence import workers_here
from vecfleet.fleet.roles import Role, niceness_option, role_options, run_role, with_given
from vecfleet.worker.machine import read_gpus
from vecfleet.worker.window import ResourceLimits


@click.command()
@role_options
@click.option(
    "--model",
    "models",
    metavar="M",
    multiple=True,
    help="Hub id, directory or package:NAME; with --gpus, as often as you like.",
)
@click.option(
    "--gpus",
    metavar="all|0,1",
    help="Keep a process running for each of these GPUs and models; without a GPU, on the CPU.",
)
@click.option(
    "--claim-gpu",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="As --gpus with one GPU: the first that no other worker with this folder holds.",
)
@click.option(
    "--replicas-per-gpu",
    "replicas",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="With --gpus: processes of each model on each GPU.",
)
@engine_options
@click.option("--name", metavar="NAME", help="This worker's name; unique among the living.")
@click.option("--served-name", metavar="NAME", help="The name clients use for the model.")
@niceness_option
@click.pass_obj
def worker(
    settings: Settings,
    /,
    redis_url: str | None,
    check: bool,
    niceness: int,
    models: tuple[str, ...],
    gpus: str | None,
    claim_gpu: Path | None,
    replicas: int,
    name: str | None,
    served_name: str | None,
    **given: Any,
) -> int:
    """Run one model on one device; with --gpus, several in processes of their own."""
    model = models[0] if models else None
    chosen = with_given(settings, redis_url=redis_url, model=model, **given)
    need_engine(chosen.engine)
    if gpus is not None and claim_gpu is not None:
        raise ConfigError("--gpus and --claim-gpu both say which GPUs; leave one out")
    if gpus is None and claim_gpu is None:
        if len(models) > 1 or replicas > 1:
            raise ConfigError("several workers need to be told where: add --gpus all")
        os.nice(0 if check else niceness)
        return _run_worker(chosen, check=check, name=name, served_name=served_name)
    if name is not None:
        raise ConfigError("--name is for one worker; those of --gpus make their own names")
    from vecfleet.fleet.pool import PoolOptions, check_pool, run_pool

    with ExitStack() as held:
        if claim_gpu is not None and not check:
            gpus = held.enter_context(claimed_gpu(claim_gpu, read_gpus())).uuid
        chosen_gpus = gpus or "all"
        pool = PoolOptions(
            chosen, models or (chosen.model,), chosen_gpus, replicas, served_name, niceness
        )
        return check_pool(pool) if check else run_pool(pool)


def _run_worker(chosen: Settings, *, check: bool, name: str | None, served_name: str | None) -> int:
    url = chosen.find_redis_url()

    def config(cls: Any) -> Any:
        return cls(
            redis_url=url,
            engine=engine_settings(chosen, served_name=served_name),
            name=name,
            limits=ResourceLimits(
                chosen.max_memory_percent, chosen.max_cpu_percent, chosen.resource_check_s
            ),
            max_step_s=chosen.max_step_s,
            dead_ttl_s=chosen.dead_ttl_s,
            max_merge_bytes=chosen.max_merge_bytes,
            max_unmerged_bytes=chosen.max_unmerged_bytes,
        )

    return run_role(Role("vecfleet.worker.main", "WorkerConfig", "run_worker"), config, url, check)


@click.command()
@click.option("--redis", "redis_url", metavar="URL", help="The fleet's Redis.")
@click.option("--processes", type=click.IntRange(1), default=1, help="How many to expect.")
@click.pass_obj
def health(settings: Settings, redis_url: str | None, processes: int) -> int:
    """Tell whether this host's workers show themselves in Redis; for health checks."""
    url = with_given(settings, redis_url=redis_url).find_redis_url()
    shown = workers_here(url)
    click.echo(f"{len(shown)} of {processes} show themselves")
    return 0 if len(shown) >= processes else 1
