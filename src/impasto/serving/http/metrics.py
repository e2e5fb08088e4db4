"""Metrics for Prometheus: of requests, counted here, and of the engines, which the service counts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ...checks import printable
from ..service import Service
from .running import ClientLeftError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("impasto.serve")

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
CLIENT_LEFT = 499  # as nginx counts them


class Metrics:
    """The metrics of one server."""

    def __init__(self, service: Service):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "impasto_http_requests",
            "Requests by path and status.",
            ["path", "method", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "impasto_http_request_seconds",
            "Until the answer is sent.",
            ["path"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.open = Gauge("impasto_http_requests_open", "Requests without a complete answer.", registry=self.registry)
        ready = Gauge("impasto_ready", "Whether requests are accepted.", registry=self.registry)
        ready.set_function(lambda: float(service.ready))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    @property
    def layer(self) -> Callable[[ASGIApp], ASGIApp]:
        """An ASGI application around another, which counts and logs requests, without their contents."""
        return lambda app: _Layer(app, self)


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
        except ClientLeftError:
            status = CLIENT_LEFT
        finally:
            self.metrics.open.dec()
            seconds = time.monotonic() - start
            route = getattr(
                scope.get("route"), "path", "other"
            )  # unknown paths are not labels, which are never forgotten
            method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS") else "other"
            self.metrics.requests.labels(route, method, str(status)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            path = printable(scope["path"])[:200]
            logger.info("%s %s %d %.0f ms", method, path, status, 1000 * seconds)
