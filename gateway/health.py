"""GET /health and GET /live: whether a request could be answered now; whether anybody is there."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.errors import VecfleetError
from vecfleet.common.keys import DEFAULT_TENANT
from vecfleet.gateway import answers
from vecfleet.gateway.context import context_of
from vecfleet.gateway.fleet import Fleet
from vecfleet.gateway.keyring import Keyring
from vecfleet.gateway.routing import OPEN, Routes, json_response

_TIMEOUT_S = 2.0
_KEPT_S = 1.0  # probes come often and from many; the search process is asked once a second
_MAX_COLLECTIONS = 100
_PAGE_BYTES = 4096
_FOR_EVERYBODY = ("status", "model_loaded", "index_available", "reason")


class Health:
    """The articles' fields, from what workers and the search process say."""

    def __init__(self, fleet: Fleet, keyring: Keyring | None = None) -> None:
        self._fleet = fleet
        self._keyring = keyring
        self._kept: tuple[float, int, dict[str, Any]] | None = None

    def routes(self) -> Routes:
        """The router."""
        routes = Routes("operation")
        routes.add(
            "GET",
            "/health",
            self.read,
            says="200 when a model is served, 503 otherwise",
            scopes=OPEN,
            answer=answers.HEALTH,
        )
        routes.add(
            "GET",
            "/live",
            self.live,
            says="200 while the gateway answers at all",
            scopes=OPEN,
            answer=answers.LIVE,
        )
        return routes

    async def read(self, request: Request) -> Response:
        """``documents_indexed`` counts over all collections.

        Whoever may not see the whole fleet is told only whether it works.
        """
        now = time.monotonic()
        if self._kept is None or now - self._kept[0] > _KEPT_S:
            self._kept = (now, *await self._look())
        _, status, found = self._kept
        if not context_of(request).caller.is_operator:
            found = {name: found[name] for name in _FOR_EVERYBODY if name in found}
        return json_response(found, status)

    async def live(self, request: Request) -> Response:
        """Asks nobody: Redis may be away, and restarting the gateway would not bring it back."""
        return json_response({"status": "alive"})

    async def _look(self) -> tuple[int, dict[str, Any]]:
        found: dict[str, Any] = {
            "status": "unhealthy",
            "model_loaded": False,
            "index_available": False,
            "documents_indexed": 0,
            "gpu_count": 0,
            "workers_paused": 0,
            "memory_usage": {"gateway_rss_bytes": _resident_bytes()},
        }
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                models = await self._fleet.models()
                found["model_loaded"] = any(model.workers for model in models)
                workers = (await self._fleet.state()).workers
                found["gpu_count"] = len(
                    {w.name for w in workers if w.fields.get("device", "").startswith("cuda")}
                )
                found["workers_paused"] = sum(bool(worker.paused) for worker in workers)
                found["documents_indexed"] = await self._documents()
                found["index_available"] = True
        except VecfleetError as error:
            found["reason"] = error.code
        except TimeoutError:
            found["reason"] = "deadline_exceeded"
        if not found["model_loaded"]:
            found.setdefault("reason", "no_worker")
            return 503, found
        found["status"] = "healthy" if found["index_available"] else "degraded"
        return 200, found

    def _tenants(self) -> list[str]:
        others = self._keyring.tenants() if self._keyring is not None else []
        return sorted({DEFAULT_TENANT, *others})

    async def _documents(self) -> int:
        collections = [
            collection
            for tenant in self._tenants()
            for collection in await self._fleet.collections(tenant=tenant)
        ][:_MAX_COLLECTIONS]
        stats = await asyncio.gather(*(self._fleet.collection_stats(c) for c in collections))
        return sum(int(entry.get("documents", 0)) for entry in stats)


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return 0
