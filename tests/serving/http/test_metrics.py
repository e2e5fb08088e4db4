"""Health, readiness and metrics."""

from __future__ import annotations

import re

import httpx
from tests.serving.http.running import running
from tests.serving.http.test_openai import call

from impasto.serving.stub import StubService


def values(text: str) -> dict[str, float]:
    """The samples of Prometheus' text format."""
    return {name: float(value) for name, value in re.findall(r"^(impasto\S+) (\S+)$", text, re.M)}


def test_requests_and_images_are_counted():
    with running(StubService(waiting=2)) as served, httpx.Client(base_url=served.url) as client:
        assert client.post("/v1/images/generations", json={"prompt": "a", "n": 2}).status_code == 200
        assert client.post("/v1/images/generations", json={"prompt": "a", "n": 3}).status_code == 429
        for i in range(5):
            client.get(f"/nothing/{i}")
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = values(answer.text)
    path = 'path="/v1/images/generations"'
    assert found[f'impasto_http_requests_total{{method="POST",{path},status="200"}}'] == 1
    assert found[f'impasto_http_requests_total{{method="POST",{path},status="429"}}'] == 1
    assert found['impasto_http_requests_total{method="GET",path="other",status="404"}'] == 5
    assert found['impasto_images_total{outcome="finished"}'] == 2
    assert found['impasto_images_rejected_total{reason="full"}'] == 3
    assert found['impasto_image_seconds_bucket{le="+Inf"}'] == 2
    assert found["impasto_ready"] == 1
    assert found['impasto_model_loaded{model="scenes"}'] == 0


def test_readiness_is_that_of_the_service():
    service = StubService()
    assert call("GET", "/ready", service).json() == {"status": "ready"}
    service.ready = False
    answer = call("GET", "/ready", service)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "10"
    assert call("GET", "/health", service).json() == {"status": "ok"}
