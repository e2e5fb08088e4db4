"""Health, readiness and metrics."""

from __future__ import annotations

import re

import httpx
import pytest
from tests.serving.http.running import running
from tests.serving.http.test_client import until
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


@pytest.mark.parametrize(("leaves", "status"), [(True, 499), (False, 200)])
def test_a_stream_that_its_client_leaves_is_counted_so(leaves: bool, status: int):
    body = {"prompt": "a", "num_inference_steps": 200 if leaves else 3, "stream": True}
    path = "/v1/images/generations"
    counted = f'impasto_http_requests_total{{method="POST",path="{path}",status="{status}"}}'
    with running(StubService(seconds=0.02)) as served, httpx.Client(base_url=served.url) as client:
        with client.stream("POST", path, json=body) as answer:
            texts = answer.iter_text()
            next(texts)
            if not leaves:
                assert "image_generation.completed" in "".join(texts)
        until(lambda: values(client.get("/metrics").text).get(counted) == 1)


def test_readiness_is_that_of_the_service():
    service = StubService()
    assert call("GET", "/ready", service).json() == {"status": "ready"}
    service.ready = False
    answer = call("GET", "/ready", service)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "10"
    assert call("GET", "/health", service).json() == {"status": "ok"}
