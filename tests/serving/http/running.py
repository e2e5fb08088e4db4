"""A server in a thread, as clients see it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from impasto.serving.http.app import create_app
from impasto.serving.http.server import Server, bind, make_server
from impasto.serving.http.settings import HttpSettings
from impasto.serving.stub import StubService


class Running:
    """A server that runs.

    Attributes:
        url: http://127.0.0.1:PORT
    """

    def __init__(self, service: Any, settings: HttpSettings):
        self.service = service
        self.socket = bind("127.0.0.1", 0)
        self.socket.listen(128)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server: Server = make_server(create_app(service, settings), service, settings, drain_seconds=20)
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.run(self.server.serve(sockets=[self.socket]))


@contextlib.contextmanager
def running(service: Any = None, settings: HttpSettings | None = None, **changes: Any) -> Iterator[Running]:
    """A server on a free port, which is drained and ended afterwards."""
    found = Running(service or StubService(), replace(settings or HttpSettings(), **changes))
    found.thread.start()
    try:
        yield found  # its socket listens: connections wait until it accepts them
    finally:
        found.server.end()
        found.thread.join(30)
        assert not found.thread.is_alive()
