"""GET /health and GET /live: whether a request could be answered now; whether anybody is there."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.collection import Collection
from vecfleet.common.errors import VecfleetError
from vecfleet.common.keys import DEFAULT_TENANT
from vecfleet.gateway import answers
from vecfleet.gateway.context import context_of
from vecfleet.gateway.fleet import Fleet
from vecfleet.gateway.keyring import Keyring
from vecfleet.gateway.routing import OPEN, Routes, json_response

_TIMEOUT_S = 2.0
_KEPT_S = 1.0  # probes come often and from many; the fleet is looked at once a second
_MAX_COLLECTIONS = 100
_PAGE_BYTES = 4096
_FOR_EVERYBODY = ("status", "model_loaded", "index_available", "reason")


@dataclass(slots=True)
class _Look:
    """One look at the fleet, which all who ask meanwhile and for a second after share."""

    task: asyncio.Task[tuple[int, dict[str, Any]]]
    ended: float | None = None  # on the monotonic clock

    def note_end(self, _: object) -> None:
        self.ended = time.monotonic()

    @property
    def is_fresh(self) -> bool:
        return self.ended is None or time.monotonic() - self.ended <= _KEPT_S


class Health:
    """The articles' fields, from what workers and the search process say."""

    def __init__(self, fleet: Fleet, keyring: Keyring | None = None) -> None:
        self._fleet = fleet
        self._keyring = keyring
        self._kept: dict[bool, _Look] = {}  # by whether it counts everything

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
        counts = context_of(request).caller.is_operator
        kept = self._kept.get(counts)
        if kept is None or not kept.is_fresh:
            kept = self._kept[counts] = _Look(asyncio.create_task(self._look(counts)))
            kept.task.add_done_callback(kept.note_end)
        status, found = await asyncio.shield(kept.task)
        if not counts:
            found = {name: found[name] for name in _FOR_EVERYBODY if name in found}
        return json_response(found, status)

    async def live(self, request: Request) -> Response:
        """Asks nobody: Redis may be away, and restarting the gateway would not bring it back."""
        return json_response({"status": "alive"})

    async def _look(self, counts: bool) -> tuple[int, dict[str, Any]]:
        """A status and what is found; without ``counts`` one collection shows that search works."""
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
                if counts:
                    workers = (await self._fleet.state()).workers
                    found["gpu_count"] = len(
                        {w.name for w in workers if w.fields.get("device", "").startswith("cuda")}
                    )
                    found["workers_paused"] = sum(bool(worker.paused) for worker in workers)
                found["documents_indexed"] = await self._documents(
                    _MAX_COLLECTIONS if counts else 1
                )
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

    async def _documents(self, most: int) -> int:
        """Those of the first ``most`` collections."""
        collections: list[Collection] = []
        for tenant in self._tenants():
            if len(collections) < most:
                collections += await self._fleet.collections(tenant=tenant)
        del collections[most:]
        stats = await asyncio.gather(*(self._fleet.collection_stats(c) for c in collections))
        return sum(int(entry.get("documents", 0)) for entry in stats)


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return 0
