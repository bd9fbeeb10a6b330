"""The command that runs the gateway."""

from __future__ import annotations

from typing import Any

import click

from vecfleet.common.settings import Settings
from vecfleet.fleet.door import check_door, door_options
from vecfleet.fleet.installed import need
from vecfleet.fleet.roles import Role, role_options, run_role, with_given


@click.command()
@role_options
@door_options
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

    return run_role(
        Role("vecfleet.gateway.main", "GatewayConfig", "run_gateway"), config, url, check
    )
