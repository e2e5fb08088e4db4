"""Bounds of what clients send and of how slowly, as a layer around the application."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from .errors import RETRY, ApiError, error_body
from .settings import HttpSettings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


MAX_HEADER_BYTES = 32 << 10
_BODY = "impasto.body"


def release(scope: Scope) -> None:
    """Count the body of a request no more: it has been read, and nothing refers to it."""
    if _BODY in scope:
        scope[_BODY].release()


class Limits:
    """An ASGI application around another: bodies are bounded in bytes and time, one alone and all together.

    A body counts until ``release``, or until the answer is sent.

    A body that is too large is read to its end for a while, without being kept, as clients read the answer only then.
    """

    def __init__(self, app: ASGIApp, settings: HttpSettings):
        self.app, self.settings = app, settings
        self.buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            await answer_error(scope, send, "the headers are too large", 431)
            return
        scope[_BODY] = body = _Body(self, scope, receive)
        try:
            await self.app(scope, body.receive, send)
        finally:
            body.release()


class _Body:
    """The body of one request on its way in."""

    def __init__(self, limits: Limits, scope: Scope, receive: Receive):
        self.limits, self.settings, self._receive = limits, limits.settings, receive
        self.end = time.monotonic() + self.settings.body_seconds
        self.size, self.complete = 0, False
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        self.announced = int(length) if length.isdigit() and len(length) < 20 else 0

    async def receive(self) -> Message:
        if self.complete:
            return await self._receive()  # until the client leaves
        if self.announced > self.settings.max_body:
            await self._refuse_size()
        message = await self._next()
        count = len(message.get("body", b""))
        self.size += count
        self.limits.buffered += count
        self.complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        if self.size > self.settings.max_body:
            await self._refuse_size()
        if self.limits.buffered > self.settings.max_buffered:
            await self._discard()
            raise ApiError("the server is receiving too much at once; try again later", status=503, headers=RETRY)
        return message

    def release(self) -> None:
        self.limits.buffered -= self.size
        self.size = 0

    async def _next(self) -> Message:
        seconds = min(self.settings.receive_seconds, self.end - time.monotonic())
        try:
            return await asyncio.wait_for(self._receive(), max(0.01, seconds))
        except TimeoutError:
            raise ApiError("the request arrives too slowly", status=408, headers={"Connection": "close"}) from None

    async def _refuse_size(self) -> None:
        await self._discard()
        most = self.settings.max_body
        raise ApiError(f"the request is larger than {most:,} bytes", status=413, code="request_too_large")

    async def _discard(self) -> None:
        """Receive the rest, up to four times what is allowed."""
        seen = 0
        while not self.complete and seen < 4 * self.settings.max_body:
            message = await self._next()
            seen += len(message.get("body", b""))
            self.complete = message["type"] == "http.disconnect" or not message.get("more_body", False)


async def answer_error(
    scope: Scope, send: Send, message: str, status: int, headers: dict[str, str] | None = None
) -> None:
    """Answer with an error outside of the application."""
    from starlette.responses import JSONResponse

    response = JSONResponse(error_body(message, status, path=scope["path"]), status, headers)
    await send({"type": "http.response.start", "status": status, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})
