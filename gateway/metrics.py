"""Prometheus metrics: what this gateway did, and what the fleet looks like at the scrape."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from vecfleet.common.directory import ServedModel
from vecfleet.common.errors import VecfleetError
from vecfleet.common.fleet_state import FleetState
from vecfleet.gateway.context import context_of
from vecfleet.gateway.fleet import Fleet
from vecfleet.gateway.routing import Routes

log = logging.getLogger(__name__)

_SCRAPE_TIMEOUT_S = 3.0
_LATENCY_BUCKETS_S = (
    0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip


class HttpMetrics:
    """Counters of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "vecfleet_http_requests",
            "Requests answered, by route and status",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._latency = Histogram(
            "vecfleet_http_request_seconds",
            "From a request's headers to the end of its answer",
            ("route",),
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.documents = Counter(
            "vecfleet_submitted_documents",
            "Documents taken in or refused at this gateway",
            ("outcome",),
            registry=self.registry,
        )
        self.submissions = Counter(
            "vecfleet_submissions", "Submissions begun at this gateway", registry=self.registry
        )
        self.streams = Gauge(
            "vecfleet_open_streams", "NDJSON bodies being read", registry=self.registry
        )
        # Looking a child up by its labels costs more than counting; requests repeat themselves.
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        found = self._children.get((method, route, status))
        if found is None:
            found = (
                self._requests.labels(_known_method(method), route, str(status)),
                self._latency.labels(route),
            )
            if len(self._children) < 1000:  # the method is the client's to choose
                self._children[(method, route, status)] = found
        found[0].inc()
        found[1].observe(seconds)


class MetricsRoute:
    """GET /metrics."""

    def __init__(self, fleet: Fleet, metrics: HttpMetrics) -> None:
        self._fleet = fleet
        self._metrics = metrics

    def routes(self) -> Routes:
        """The router."""
        routes = Routes("operation")
        routes.add(
            "GET",
            "/metrics",
            self.read,
            says="Prometheus metrics",
            scopes=("admin",),
            answer={"type": "string"},
            media=("text/plain",),
        )
        return routes

    async def read(self, request: Request) -> Response:
        """The gateway's counters, and the fleet's gauges when Redis answers in time."""
        context_of(request).caller.check_operator()
        text = generate_latest(self._metrics.registry)
        registry = CollectorRegistry()
        try:
            async with asyncio.timeout(_SCRAPE_TIMEOUT_S):
                state, models = await self._fleet.state(), await self._fleet.models()
            registry.register(_FleetCollector(state, models))
        except (VecfleetError, TimeoutError) as error:
            log.warning("the fleet's state cannot be read for metrics: %s", error)
            registry.register(_FleetCollector(None, []))
        return Response(text + generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


class _FleetCollector(Collector):
    def __init__(self, state: FleetState | None, models: Iterable[ServedModel]) -> None:
        self._state = state
        self._models = models

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("vecfleet_redis_up", "Whether Redis answered this scrape")
        up.add_metric((), 0.0 if self._state is None else 1.0)
        yield up
        if self._state is None:
            return
        for name, help_text in (
            ("jobs", "Jobs waiting"),
            ("tokens", "Tokens waiting, as estimated"),
            ("bytes", "Bytes waiting"),
            ("in_flight", "Jobs claimed by workers"),
            ("dead", "Jobs in the dead letter"),
            ("parked", "Jobs that wait until this merge queue has room"),
            ("parked_bytes", "Bytes of the jobs that wait until this merge queue has room"),
        ):
            gauge = GaugeMetricFamily(f"vecfleet_queue_{name}", help_text, labels=("queue",))
            for load in self._state.queues:
                gauge.add_metric((load.queue,), getattr(load, name))
            yield gauge
        for name, help_text in (
            ("jobs", "Jobs waiting, all tenants"),
            ("tokens", "Tokens waiting, all tenants, as estimated"),
            ("bytes", "Bytes waiting, all tenants"),
            ("tenants", "Tenants with something waiting"),
        ):
            gauge = GaugeMetricFamily(f"vecfleet_line_{name}", help_text, labels=("line",))
            for line in self._state.lines:
                gauge.add_metric((line.line,), getattr(line, name))
            yield gauge
        dead = GaugeMetricFamily(
            "vecfleet_dead_bytes", "Bytes in the dead letter, as it is counted", labels=("tenant",)
        )
        for tenant, size in self._state.dead_bytes.items():
            dead.add_metric((tenant,), size)
        yield dead
        left_out = GaugeMetricFamily("vecfleet_queues_left_out", "Queues that are not shown")
        left_out.add_metric((), self._state.queues_left_out)
        yield left_out
        workers = GaugeMetricFamily("vecfleet_model_workers", "Live workers", labels=("model",))
        rates = GaugeMetricFamily(
            "vecfleet_model_tokens_per_second", "What live workers say they do", labels=("model",)
        )
        paused = GaugeMetricFamily(
            "vecfleet_model_workers_paused", "Live workers that claim nothing", labels=("model",)
        )
        resting = {worker.name for worker in self._state.workers if worker.paused}
        for model in self._models:
            workers.add_metric((model.card.name,), len(model.workers))
            paused.add_metric((model.card.name,), len(resting.intersection(model.workers)))
            rates.add_metric((model.card.name,), model.tokens_per_s)
        yield workers
        yield paused
        yield rates


def _known_method(method: str) -> str:
    return method if method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS") else "other"
