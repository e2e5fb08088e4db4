"""A server that is killed at any moment, and the next one with its folder of images."""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from tests.serving.http.running import running

from impasto.serving.http.app import create_app
from impasto.serving.http.server import bind, make_server
from impasto.serving.http.settings import HttpSettings
from impasto.serving.stub import StubService


def serve(bound: socket.socket, storage: str) -> None:
    """A process of its own, so that it can be killed."""
    service, settings = StubService(), HttpSettings(storage=Path(storage))
    server = make_server(create_app(service, settings), service, settings)
    asyncio.run(server.serve(sockets=[bound]))


def ask(url: str, given: dict[str, bytes | None]) -> None:
    """One image after another until the server is gone: their links, and what was found there, if it was."""
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            for i in range(100_000):
                body = {"prompt": f"{i}", "size": "256x256", "response_format": "url"}
                link = client.post("/v1/images/generations", json=body).raise_for_status().json()["data"][0]["url"]
                path = httpx.URL(link).path
                given[path] = None
                given[path] = client.get(link).raise_for_status().content
    except httpx.TransportError:
        pass


@pytest.mark.long
def test_stored_images_survive_a_server_that_is_killed_under_load(tmp_path: Path):
    storage = tmp_path / "images"
    given = dict[str, bytes | None]()
    for _ in range(3):
        before = len(given)
        with bind("127.0.0.1", 0) as bound:
            bound.listen(128)  # connections wait until the server accepts them
            url = f"http://127.0.0.1:{bound.getsockname()[1]}"
            process = start(bound, storage)
        clients = [threading.Thread(target=ask, args=(url, given), daemon=True) for _ in range(4)]
        for client in clients:
            client.start()
        while len(given) < before + 20 and any(client.is_alive() for client in clients):
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        for client in clients:
            client.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert len(given) >= before + 20

    with running(storage=storage) as served, httpx.Client(base_url=served.url) as client:
        files = {path.name for path in storage.iterdir()}
        assert all(name.startswith("img-") and name.endswith(".png") for name in files)  # nothing half-written
        for name in files:
            Image.open(storage / name).load()
        for link, content in given.items():
            found = client.get(link).raise_for_status().content
            assert content in (found, None)
            assert Image.open(io.BytesIO(found)).size == (256, 256)


def start(bound: socket.socket, storage: Path) -> Any:
    context = multiprocessing.get_context("forkserver")  # forks of a process that has only imported
    context.set_forkserver_preload([__name__])
    process = context.Process(target=serve, args=(bound, str(storage)), daemon=True)
    process.start()
    return process
