"""Submit jobs and wait for their images. A client that leaves ends its jobs."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request

from ..job import Event, Failed, Finished, Job
from ..service import Generation, Service
from .errors import ApiError, of_failure

logger = logging.getLogger("impasto.serve")
T = TypeVar("T")

#: In the scope of a request: whether its answer has begun as a stream whose last event has not been sent.
UNFINISHED = "impasto.unfinished"


class ClientLeftError(Exception):
    """Nobody waits for the answer."""


def new_id() -> str:
    """An id that cannot be guessed."""
    return f"img-{secrets.token_hex(16)}"


def random_seed() -> int:
    """A seed that leaves room for those of further images."""
    return secrets.randbelow(2**32)


async def disconnected(request: Request) -> None:
    """Return when the client has left. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def generate(
    request: Request, service: Service, jobs: Sequence[Job], watch: Callable[[Event], None] | None = None
) -> list[Finished]:
    """The images of jobs, in their order; if one fails, or the client leaves, the others are cancelled.

    Args:
        request: whose body has been read.
        watch: is called with each event.

    Raises:
        RefusedError: the jobs are not accepted.
        ApiError: one of them failed.
        ClientLeftError: the client has left.
    """
    return await gather(request, service.submit(jobs), lambda generation: finish(generation, watch))


async def gather(
    request: Request, generations: Sequence[Generation], wait: Callable[[Generation], Coroutine[Any, Any, T]]
) -> list[T]:
    """What ``wait`` makes of each accepted job; if one raises, or the client leaves, all others are cancelled.

    Args:
        request: whose body has been read.

    Raises:
        ClientLeftError: the client has left.
    """
    pending = {asyncio.ensure_future(wait(generation)): generation for generation in generations}
    order = list(pending)
    left = asyncio.ensure_future(disconnected(request))
    try:
        waiting = set(order)
        while waiting:
            done, _ = await asyncio.wait({*waiting, left}, return_when=asyncio.FIRST_COMPLETED)
            for task in order:
                if task in done:
                    task.result()
            waiting -= done
            if left in done and waiting:
                raise ClientLeftError
        return [task.result() for task in order]
    finally:
        left.cancel()
        for task, generation in pending.items():
            if not task.done():
                generation.cancel()
                task.cancel()
        await asyncio.gather(left, *order, return_exceptions=True)


async def finish(generation: Generation, watch: Callable[[Event], None] | None = None) -> Finished:
    """Wait for the image of one job. Raises ApiError if it fails."""
    async with aclosing(events_of(generation)) as events:
        async for event in events:
            if watch is not None:
                watch(event)
            if isinstance(event, Finished):
                return event
            if isinstance(event, Failed):
                raise of_failure(event)
    raise ApiError("the server failed; its log has the reason", status=500)


async def events_of(generation: Generation) -> AsyncGenerator[Event, None]:
    """The events of a job, which is cancelled if nobody reads on."""
    ended = False
    try:
        async for event in generation.events():
            ended = isinstance(event, Finished | Failed)
            yield event
    finally:
        if not ended:
            generation.cancel()


def deadline(seconds: float) -> float:
    """The time at which nobody waits any more."""
    return time.time() + seconds
