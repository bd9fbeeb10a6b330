"""The commands that run something: one role against any Redis, or a whole fleet."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import click

from vecfleet.common.api_keys import read_keys
from vecfleet.common.errors import ConfigError
from vecfleet.common.settings import Settings, redact_url, set_process_env
from vecfleet.fleet.engine_options import engine_options, engine_settings, options
from vecfleet.fleet.machine import claimed_gpu
from vecfleet.fleet.presence import workers_here
from vecfleet.worker.machine import read_gpus
from vecfleet.worker.window import ResourceLimits

log = logging.getLogger(__name__)

DEFAULT_NICENESS = 10

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

_role = options(
    click.option("--redis", "redis_url", metavar="URL", help="The fleet's Redis."),
    click.option("--check", is_flag=True, help="Check settings and installation, and end."),
)
_niceness = click.option(
    "--niceness",
    default=DEFAULT_NICENESS,
    show_default=True,
    type=click.IntRange(0, 19),
    help="How far workers and the index's writer stand back, so that searches go first.",
)
_fleet = options(
    click.option("--port", type=click.IntRange(0, 65535), help="The gateway's port."),
    click.option("--model", metavar="M", help="Hub id, directory or package:NAME."),
    click.option("--reranker", metavar="R", help="A model that reranks, named likewise."),
    engine_options,
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
class _Role:
    module: str
    config: str
    function: str


def _run(role: _Role, make: Callable[[Any], Any], redis_url: str, check: bool) -> int:
    module = importlib.import_module(role.module)
    config = make(getattr(module, role.config))
    if check:
        click.echo(f"settings and installation are good; Redis at {redact_url(redis_url)}")
        return 0
    return int(getattr(module, role.function)(config) or 0)


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


def need(extra: str, *modules: str) -> None:
    """Raise a ``ConfigError`` that names the extra to install when one of ``modules`` is missing.

    Nothing is imported: to look for torch must not take seconds.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not installed; get it with: pip install 'vecfleet[{extra}]'"
        )


def _need_engine(engine: str) -> None:
    if engine in ("fake", "null"):
        need("worker", "numpy", "psutil")
    elif engine == "vllm":
        need("vllm", "numpy", "psutil", "torch", "transformers", "vllm")
    else:
        need("worker", "numpy", "psutil", "torch", "transformers")


def _need_all(engine: str) -> None:
    need("local", "numpy", "faiss", "fastapi", "uvicorn")
    if engine in ("auto", "torch"):
        need("local", "torch", "transformers")
    else:
        _need_engine(engine)


_PATH: Any = click.Path(path_type=Path)
_keys = options(
    click.option("--keys-file", type=_PATH, help="The API keys; see `vecfleet keys`."),
    click.option("--no-keys", is_flag=True, default=None, help="Serve everybody who reaches it."),
    click.option("--tls-cert", type=_PATH, help="Serve HTTPS with this certificate (PEM)."),
    click.option("--tls-key", type=_PATH, help="Its private key."),
)


@click.command()
@_role
@_keys
@click.option("--host", metavar="ADDRESS", help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), help="The port to listen on.")
@click.option("--model", metavar="M", help="The model where a request names none.")
@click.option("--reranker", metavar="R", help="The reranker where a request names none.")
@click.option("--collection", metavar="C", help="What POST /search reads.")
@click.pass_obj
def gateway(
    settings: Settings,
    /,
    redis_url: str | None,
    check: bool,
    host: str | None,
    port: int | None,
    model: str | None,
    reranker: str | None,
    collection: str | None,
    **given: Any,
) -> int:
    """Run the HTTP gateway."""
    need("gateway", "fastapi", "uvicorn")
    chosen = with_given(settings, redis_url=redis_url, host=host, port=port, **given)
    check_door(chosen)
    url = chosen.find_redis_url()

    def config(cls: Any) -> Any:
        return cls(
            redis_url=url,
            host=chosen.host,
            port=chosen.port,
            keys_file=None if chosen.no_keys else chosen.find_keys_file(),
            no_keys=chosen.no_keys,
            tls_cert=chosen.tls_cert,
            tls_key=chosen.tls_key,
            embed_model=model,
            rerank_model=reranker,
            collection=collection,
            timeout_s=chosen.timeout_s,
            max_body_bytes=chosen.max_body_bytes,
            admission=chosen.admission(),
        )

    return _run(_Role("vecfleet.gateway.main", "GatewayConfig", "run_gateway"), config, url, check)


@click.command()
@_role
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
@_niceness
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
    _need_engine(chosen.engine)
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

    return _run(_Role("vecfleet.worker.main", "WorkerConfig", "run_worker"), config, url, check)


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


@click.command()
@_role
@click.option("--data", type=click.Path(path_type=Path), help="The index's folder, a local disk.")
@click.option("--home", default="main", show_default=True, help="This aggregator's name.")
@click.option(
    "--only",
    type=click.Choice(["writer", "search"]),
    help="Run one of the two processes; by default both.",
)
@_niceness
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

    def config(cls: Any) -> Any:
        return cls(
            redis_url=url,
            data_dir=chosen.data,
            home=home,
            dead_ttl_s=chosen.dead_ttl_s,
            max_merge_bytes=chosen.max_merge_bytes,
        )

    if only == "writer" and not check:
        os.nice(niceness)
    if only == "search":
        # Searches run one after the other. A second thread of theirs would gain little, and where
        # its core is busy the first one spins until it has come round: a hundred milliseconds.
        for name in _THREADS:
            set_process_env(name, "1")
    function = "run_search" if only == "search" else "run_aggregator"
    return _run(_Role("vecfleet.worker.main", "AggregatorConfig", function), config, url, check)


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


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Where everything is kept.")
@click.option("--host", metavar="ADDRESS", help="The address the gateway listens on.")
@_keys
@_fleet
@click.option(
    "--workers", default="auto", show_default=True, help="How many, or auto: one a GPU, else one."
)
@_niceness
@click.pass_obj
def up(settings: Settings, /, workers: str, niceness: int, host: str | None, **given: Any) -> int:
    """Run Redis, workers, aggregator and gateway on this machine until Ctrl-C, which drains."""
    from vecfleet.fleet.up import FleetOptions, run_up

    chosen = with_given(settings, host=host, **given)
    _need_all(chosen.engine)
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
@_fleet
@click.pass_obj
def demo(settings: Settings, /, documents: int | None, source: Path | None, **given: Any) -> int:
    """Ingest the docstrings of the installed Python packages, ask questions, and sum up."""
    given["port"] = given["port"] or 0  # any that is free: nobody has to know it
    chosen = with_given(settings, **given)
    _need_all(chosen.engine)
    from vecfleet.fleet.demo import DemoOptions, run_demo

    return run_demo(DemoOptions(chosen, documents, source))
