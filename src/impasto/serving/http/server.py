"""The listening server: uvicorn, with bounds on slow clients and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import sys
import time
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ...errors import ConfigurationError
from ..service import Service
from .errors import error_body
from .limits import MAX_HEADER_BYTES
from .settings import HttpSettings

logger = logging.getLogger("impasto.serve")

MAX_CONNECTIONS = 1000
MIN_RATE = 1024  # bytes a second that a client must read
MAX_READING = 600  # seconds in which it must read what is ready at once
ANSWER_SECONDS = 30  # in which answers are sent when all images have ended


class BoundedProtocol(H11Protocol):
    """A connection that ends if its client is too slow to ask, or to read the answer."""

    #: Set by ``make_server`` on a subclass.
    settings = HttpSettings()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        now = time.monotonic()
        self._idle_since = self._read_at = self._unread_since = now
        self._unread = self._first_unread = 0
        self._timer = self.loop.call_later(self._tick, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._idle_since = time.monotonic()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or has too large headers, in the form of other errors."""
        error = sys.exc_info()[1]
        status = getattr(error, "error_status_hint", 400)
        message = "the headers are too large" if status == 431 else "the request is not valid HTTP"
        body = json.dumps(error_body(message, status)).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers.append((b"content-length", str(len(body)).encode()))
        with contextlib.suppress(h11.LocalProtocolError):  # an answer has begun
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def _tick(self) -> float:
        return min(self.settings.receive_seconds, self.settings.send_seconds) / 4

    def _check(self) -> None:
        now, unread = time.monotonic(), self.transport.get_write_buffer_size()
        self._first_unread = max(self._first_unread, unread) if unread else 0
        if unread == 0:
            self._unread_since = now
        if unread == 0 or unread <= self._unread - max(MIN_RATE, self._first_unread / MAX_READING) * self._tick:
            self._read_at = now
        self._unread = unread
        if unread:
            self._bound_unread()
        asks = self.cycle is None or self.cycle.response_complete
        if unread == 0 and asks and now - self._idle_since > self.settings.receive_seconds:
            self.transport.abort()
        elif now - self._read_at > self.settings.send_seconds:
            logger.info("a client does not read its answer; its connection is closed")
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(self._tick, self._check)

    def _bound_unread(self) -> None:
        """Give up the answer that has been unread for longest, if all have too many bytes together."""
        known = [one for one in self.connections if isinstance(one, BoundedProtocol)]
        sizes = {one: one.transport.get_write_buffer_size() for one in known}
        if sum(sizes.values()) > self.settings.max_unread:
            longest = min((one for one, size in sizes.items() if size), key=lambda one: one._unread_since)
            logger.info("clients do not read their answers; the connection of one of them is closed")
            longest.transport.abort()


class Server(uvicorn.Server):
    """A server that, when asked to end, refuses new work and finishes what it has accepted.

    Args:
        drain_seconds: after which it ends all the same, within ``ANSWER_SECONDS``.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float):
        super().__init__(config)
        self.service, self.drain_seconds = service, drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self._asked = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one ends at once."""
        if self._asked:
            self.should_exit = self.force_exit = True
        self.end()

    def end(self) -> None:
        """Drain and end. May be called in any thread."""
        if self._asked:
            return
        self._asked = True
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        self._ending = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        logger.info("the server ends: it finishes what it has accepted")
        try:
            await asyncio.wait_for(self.service.drain(), self.drain_seconds)
        except TimeoutError:
            logger.warning("some images were not done in %g seconds; they are given up", self.drain_seconds)
            self.service.give_up()  # their clients are answered before the server ends
        finally:
            self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address; port 0 takes a free one.

    Raises:
        ConfigurationError: the address is unknown, in use, or not permitted.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"--host {host} is not an address of this machine: {error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(2048)  # connections wait until they are accepted
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{host}, port {port}: {reason}; choose another --host or --port") from error
    return bound


def make_server(app: FastAPI, service: Service, settings: HttpSettings, drain_seconds: float = 120.0) -> Server:
    """The server of an application; ``await server.serve(sockets=[bind(...)])`` runs it."""
    protocol: Any = type("Protocol", (BoundedProtocol,), {"settings": settings})
    config = uvicorn.Config(
        app,
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=ANSWER_SECONDS,
    )
    return Server(config, service, drain_seconds)
