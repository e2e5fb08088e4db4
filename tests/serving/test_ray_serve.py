"""Replicas of the server behind one endpoint."""

from __future__ import annotations

import base64
import importlib
import io
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from impasto.errors import ConfigurationError, InputError
from impasto.serving import ray_serve

from ..tiny import write_pipeline


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": "x"}, "there is no argument 'models'; there are model, replicas"),
        ({"replicas": "2"}, "there is no model to serve"),
        ({"model": "x", "replicas": "0"}, "replicas must be a whole number from 1"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ray_serve.application(arguments)


def test_the_arguments_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(ray_serve, "deploy", lambda *args, **options: found.append((args, options)))
    ray_serve.application({"model": "a=builtin:scenes,hub/name", "replicas": "3", "gpus": "0.5", "dtype": "float32"})
    assert found == [(({"a": "builtin:scenes", "name": "hub/name"}, 3), {"gpus": 0.5, "dtype": "float32"})]


def test_keys_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    found: list[Any] = []
    monkeypatch.setattr(ray_serve, "deploy", lambda *args, **options: found.append(options["settings"].keys))
    key = "0123456789abcdef"
    (tmp_path / "keys").write_text(f"# of the cluster\n{key}\n")
    ray_serve.application({"model": "x", "api_key_file": str(tmp_path / "keys")})
    assert found == [(key,)]
    with pytest.raises(ConfigurationError):
        ray_serve.application({"model": "x", "api_key_file": str(tmp_path / "gone")})


@pytest.mark.cluster
def test_two_replicas_answer_at_one_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    httpx = pytest.importorskip("httpx")
    serve = pytest.importorskip("ray.serve")
    import ray

    model = write_pipeline(tmp_path / "model")
    places = [str(Path(importlib.import_module("impasto").__file__).parents[1]), *sys.path]  # type: ignore[arg-type]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        application = ray_serve.deploy({"tiny": str(model)}, 2, cpus=0.1, device="cpu", dtype="float32")
        serve.run(application)
        address = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{address}/ready", timeout=60).json() == {"status": "ready"}
        asked = {"prompt": "a cat", "size": "16x16", "num_inference_steps": 2, "seed": 3, "n": 1}
        images = set()
        for _ in range(6):
            answer = httpx.post(f"{address}/v1/images/generations", json=asked, timeout=120)
            assert answer.status_code == 200, answer.text
            content = base64.b64decode(answer.json()["data"][0]["b64_json"])
            images.add(Image.open(io.BytesIO(content)).tobytes())
        assert len(images) == 1
        wrong = httpx.post(f"{address}/v1/images/generations", json={"promt": "a cat"}, timeout=60)
        assert wrong.status_code == 400
        status = serve.status().applications["default"].deployments
        assert [deployment.replica_states for deployment in status.values()] == [{"RUNNING": 2}]
    finally:
        serve.shutdown()
        ray.shutdown()
