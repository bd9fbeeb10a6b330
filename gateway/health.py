"""GET /health: whether a request could be answered now."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.errors import VecfleetError
from vecfleet.gateway.fleet import Fleet
from vecfleet.gateway.routing import Routes, json_response

_TIMEOUT_S = 2.0
_KEPT_S = 1.0  # probes come often and from many; the search process is asked once a second
_MAX_COLLECTIONS = 100
_PAGE_BYTES = 4096


class Health:
    """The articles' fields, from what workers and the search process say."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._kept: tuple[float, int, dict[str, Any]] | None = None

    def routes(self) -> Routes:
        """The router."""
        routes = Routes("operation")
        routes.add("GET", "/health", self.read, says="200 when a model is served, 503 otherwise")
        return routes

    async def read(self, request: Request) -> Response:
        """``documents_indexed`` counts over all collections."""
        now = time.monotonic()
        if self._kept is None or now - self._kept[0] > _KEPT_S:
            self._kept = (now, *await self._look())
        return json_response(self._kept[2], self._kept[1])

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

    async def _documents(self) -> int:
        collections = (await self._fleet.collections())[:_MAX_COLLECTIONS]
        stats = await asyncio.gather(*(self._fleet.collection_stats(c) for c in collections))
        return sum(int(entry.get("documents", 0)) for entry in stats)


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return 0
