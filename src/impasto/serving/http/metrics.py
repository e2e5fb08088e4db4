"""Metrics for Prometheus: of requests, counted here, and of the engines, which the service counts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from starlette.requests import ClientDisconnect

from ...checks import printable
from .. import stats
from ..service import Service
from .running import UNFINISHED, ClientLeftError
from .storage import hide_ids

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("impasto.serve")

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_PROBES = ("/health", "/ready", "/metrics")
CLIENT_LEFT = 499  # as nginx counts them


class Metrics:
    """The metrics of one server."""

    def __init__(self, service: Service):
        self.registry = here = CollectorRegistry()
        labels = ["path", "method", "status"]
        self.requests = Counter("impasto_http_requests", "Requests by path and status.", labels, registry=here)
        self.seconds = Histogram(
            "impasto_http_request_seconds", "Until the answer is sent.", ["path"], buckets=_SECONDS, registry=here
        )
        self.open = Gauge("impasto_http_requests_open", "Requests without a complete answer.", registry=here)
        here.register(_Engines(service))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    @property
    def layer(self) -> Callable[[ASGIApp], ASGIApp]:
        """An ASGI application around another, which counts and logs requests, without their contents."""
        return lambda app: _Layer(app, self)


class _Engines(Collector):
    """What the service counts, as metrics."""

    def __init__(self, service: Service):
        self.service = service

    def collect(self) -> Iterator[Metric]:
        found = self.service.stats
        for name, what, number in (
            ("ready", "Whether requests are accepted.", int(self.service.ready)),
            ("images_running", "Images that are being generated.", found.running),
            ("images_waiting", "Accepted images that are not begun.", found.waiting),
            ("batch_tokens", "Tokens of the last step, with both halves of guidance.", found.batch_tokens),
        ):
            yield GaugeMetricFamily(f"impasto_{name}", what, number)
        for name, what, number in (
            ("steps", "Forward passes.", found.steps),
            ("image_steps", "Steps of images, several of which share a forward pass.", found.image_steps),
            ("images_accepted", "Accepted images.", found.accepted),
            ("engine_restarts", "Engines that died after they were ready.", found.restarts),
        ):
            yield CounterMetricFamily(f"impasto_{name}", what, number)
        outcomes = {"finished": found.images, "cancelled": found.cancelled, "failed": found.failed}
        yield _by("images", "Images by outcome.", "outcome", outcomes)
        yield _by("images_rejected", "Images that were not accepted.", "reason", found.rejected)
        yield _by("stage_seconds", "Seconds of engines in a stage; wait: of all images.", "stage", found.seconds)
        yield _histogram("image_seconds", "From acceptance to the image.", found.latency)
        yield _histogram("first_step_seconds", "From acceptance to the first step.", found.first_step)
        models = GaugeMetricFamily("impasto_model_loaded", "Whether a model is loaded.", labels=["model"])
        for model in self.service.models:
            models.add_metric([model], int(model in found.models))
        yield models


def _by(name: str, what: str, label: str, numbers: dict[str, int] | dict[str, float]) -> Metric:
    family = CounterMetricFamily(f"impasto_{name}", what, labels=[label])
    for value, number in numbers.items():
        family.add_metric([value], number)
    return family


def _histogram(name: str, what: str, found: stats.Histogram) -> Metric:
    total, buckets = 0, []
    for bound, count in zip([*map(str, stats.BOUNDS), "+Inf"], found.counts, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return HistogramMetricFamily(f"impasto_{name}", what, buckets=buckets, sum_value=found.sum)


class _Layer:
    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.open.inc()
        try:
            await self.app(scope, receive, watched)
        except (ClientLeftError, ClientDisconnect):  # while it waited, or in the middle of what it sent
            status = CLIENT_LEFT
        finally:
            self.metrics.open.dec()
            if scope.get(UNFINISHED):
                status = CLIENT_LEFT
            seconds = time.monotonic() - start
            route = getattr(scope.get("route"), "path", "other")  # labels are never forgotten
            method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other"
            self.metrics.requests.labels(route, method, str(status)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            path = printable(hide_ids(scope["path"]))[:200]
            level = logging.DEBUG if path in _PROBES else logging.INFO  # they come every few seconds
            logger.log(level, "%s %s %d %.0f ms", method, path, status, 1000 * seconds)
