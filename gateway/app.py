"""The gateway's composition: which routes there are and what stands before them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from vecfleet.common.errors import VecfleetError
from vecfleet.gateway.body import Bodies
from vecfleet.gateway.collections import Collections
from vecfleet.gateway.config import GatewayConfig
from vecfleet.gateway.dead import Dead
from vecfleet.gateway.documents import Documents
from vecfleet.gateway.door import Door
from vecfleet.gateway.embeddings import Embeddings
from vecfleet.gateway.errors import on_http_error, on_vecfleet_error
from vecfleet.gateway.fleet import Fleet
from vecfleet.gateway.health import Health
from vecfleet.gateway.ingest import Ingest
from vecfleet.gateway.keyring import Keyring
from vecfleet.gateway.metrics import HttpMetrics, MetricsRoute
from vecfleet.gateway.models import Models
from vecfleet.gateway.rerank import Rerank
from vecfleet.gateway.routing import describe_keys
from vecfleet.gateway.search import Search
from vecfleet.gateway.submissions import SubmissionRoutes
from vecfleet.gateway.unread import Unread

OpenFleet = Callable[[], AbstractAsyncContextManager[object]]


def create_app(fleet: Fleet, config: GatewayConfig, open_fleet: OpenFleet | None = None) -> FastAPI:
    """The ASGI application over ``fleet``; ``open_fleet`` is entered while it runs.

    Raises ``ConfigError`` when the file of the API keys cannot be read.
    """
    keyring = None if config.keys_file is None else Keyring(config.keys_file)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if open_fleet is None:
            yield
            return
        async with open_fleet():
            yield

    app = FastAPI(
        title="vecfleet",
        description="Embed, rerank and search over a fleet of workers.",
        redirect_slashes=False,
        lifespan=lifespan,
        exception_handlers={
            VecfleetError: on_vecfleet_error,
            HTTPException: on_http_error,
        },
    )
    bodies = Bodies(config.limits)
    unread = Unread(config.limits)
    metrics = HttpMetrics()
    # The routes under load come first: the router tries them in this order.
    for part in (
        Embeddings(fleet, bodies, config, unread),
        Search(fleet, bodies, config, unread),
        Rerank(fleet, bodies, config),
        Ingest(fleet, bodies, config, metrics),
        Documents(fleet),
        Collections(fleet, bodies),
        SubmissionRoutes(fleet),
        Dead(fleet, bodies),
        Models(fleet),
        Health(fleet, keyring),
        MetricsRoute(fleet, metrics),
    ):
        app.include_router(part.routes())
    app.add_middleware(
        Door, bodies=bodies, metrics=metrics, config=config, unread=unread, keyring=keyring
    )
    describe_keys(app)
    return app
