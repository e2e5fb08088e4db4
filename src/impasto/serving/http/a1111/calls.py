"""Calls that run, and what their clients may ask of them: how far they are, and to end them.

Each key has a session of its own, with its options and calls, so that nobody changes the model of others or interrupts
them. Without keys there is one session.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request

from ....checks import shown
from ...job import Failed, Finished, Job, Preview, Progress, RawImage
from ...service import Generation, Service
from ..context import Context
from ..errors import ApiError, of_failure
from ..fields import Flag, Whole
from ..images import base64_text, encode
from ..keys import key_of
from ..running import events_of, gather

_MOST_SESSIONS = 1000
MOST_PREVIEWS = 3


class Call:
    """The jobs of one request."""

    def __init__(self, name: str, jobs: Sequence[Job]):
        self.name, self.jobs, self.started = name, jobs, time.time()
        self.generations: list[Generation] = []
        self.progress = {job.id: Progress(job.id, 0, job.steps) for job in jobs}  # an edit has fewer steps than asked
        self.seconds_left = 0.0
        self.ended: set[str] = set()
        self.stopped: set[str] = set()  # by interrupt or skip
        self.interrupted = self.skipped = False
        self.previews: dict[str, RawImage] = {}

    async def run(self, request: Request, service: Service) -> list[tuple[Job, RawImage]]:
        """The images. Of a job that was ended by ``interrupt`` or ``skip``, its last preview if there is one.

        There is at least one image, as clients take the first one: a grey one if all jobs ended before their previews.

        Raises:
            RefusedError, ApiError, ClientLeftError: as ``running.generate``.
        """
        self.generations = service.submit(self.jobs)
        found = await gather(request, self.generations, self._follow)
        images = [(job, image) for job, image in zip(self.jobs, found) if image is not None]
        return images or [(self.jobs[0], _grey(self.jobs[0]))]

    async def _follow(self, generation: Generation) -> RawImage | None:
        id = generation.job.id
        try:
            async with aclosing(events_of(generation)) as events:
                async for event in events:
                    if isinstance(event, Progress):
                        self.progress[id] = event
                        self.seconds_left = event.seconds_left or 0.0
                    elif isinstance(event, Preview):
                        self.previews[id] = event.image
                    elif isinstance(event, Finished):
                        return event.image
                    elif isinstance(event, Failed):
                        if id in self.stopped and event.reason == "cancelled":
                            return self.previews.get(id)
                        raise of_failure(event)
        finally:
            self.ended.add(id)
        raise ApiError("the server failed; its log has the reason", status=500)

    def stop(self, count: int | None = None) -> None:
        """End so many of the images that are not done, the first ones; None: all."""
        open = [one for one in self.generations if one.job.id not in self.ended | self.stopped]
        for generation in open[:count]:
            self.stopped.add(generation.job.id)
            generation.cancel()

    @property
    def fraction(self) -> float:
        """How much is done, from 0 to 1."""
        done = [1.0 if id in self.ended else min(1.0, last.step / last.steps) for id, last in self.progress.items()]
        return sum(done) / len(done)


def _grey(job: Job) -> RawImage:
    """An image of the size of the result in which nothing is to be seen yet."""
    result = job.given.images[0] if job.given is not None and job.given.padding is not None else job
    return RawImage(result.width, result.height, bytes([128]) * (3 * result.width * result.height))


class Session:
    """The options and calls of one key."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.model: str | None = None  # None: the server's default
        self.shows_previews = True
        self.preview_every = 10  # steps

    def set_options(self, context: Context, options: dict[str, Any]) -> None:
        """Take those that mean something here; the others, of which clients send hundreds, are ignored.

        Raises:
            ApiError, InputError: a value that cannot be used. Nothing is changed then.
        """
        model = chosen_model(context, options, self.model)
        shows = Flag().read("live_previews_enable", options.get("live_previews_enable", self.shows_previews))
        every = options.get("show_progress_every_n_steps", self.preview_every)
        self.preview_every = Whole(-1, 10_000).read("show_progress_every_n_steps", every)
        self.model, self.shows_previews = model, shows

    def previews_of(self, steps: int) -> int:
        """How many previews an image of so many steps has."""
        wanted = self.shows_previews and self.preview_every > 0
        return min(MOST_PREVIEWS, (steps - 1) // self.preview_every) if wanted else 0

    def interrupt(self) -> None:
        """End all calls."""
        for call in self.calls:
            call.interrupted = True
            call.stop()

    def skip(self) -> None:
        """End the first image that is not done."""
        if self.calls:
            self.calls[0].skipped = True
            self.calls[0].stop(1)

    async def progress(self, with_image: bool) -> dict[str, Any]:
        """How far the calls are, as clients read it."""
        calls = self.calls
        jobs = [job for call in calls for job in call.jobs]
        ended = {id for call in calls for id in call.ended}
        first = next((last for call in calls for id, last in call.progress.items() if id not in call.ended), None)
        fraction = sum(call.fraction * len(call.jobs) for call in calls) / len(jobs) if jobs else 0.0
        preview = next((image for call in calls for image in reversed(call.previews.values())), None)
        text = None
        if with_image and preview is not None:
            text = base64_text(await asyncio.to_thread(encode, preview))
        started = time.strftime("%Y%m%d%H%M%S", time.localtime(calls[0].started)) if calls else "0"
        return {
            "progress": min(1.0, max(0.01, fraction)) if jobs else 0.0,
            "eta_relative": max((call.seconds_left for call in calls), default=0.0),
            "state": {
                "skipped": any(call.skipped for call in calls),
                "interrupted": any(call.interrupted for call in calls),
                "stopping_generation": False,
                "job": calls[0].name if calls else "",
                "job_count": len(jobs),
                "job_timestamp": started,
                "job_no": len(ended),
                "sampling_step": first.step if first else 0,
                "sampling_steps": first.steps if first else 0,
            },
            "current_image": text,
            "textinfo": None,
        }


class Sessions:
    """The sessions of a server; the ones that were used last are kept."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()

    def of(self, request: Request) -> Session:
        """The session of the key with which a request came."""
        name = key_of(request.scope)
        session = self._sessions.setdefault(name, Session())
        self._sessions.move_to_end(name)
        if len(self._sessions) > _MOST_SESSIONS:
            idle = next((one for one, session in self._sessions.items() if not session.calls), name)
            if idle != name:
                del self._sessions[idle]
        return session


def chosen_model(context: Context, options: dict[str, Any], default: str | None) -> str | None:
    """The name of the model that options choose: ``sd_model_checkpoint``. Raises ApiError (404)."""
    name = options.get("sd_model_checkpoint")
    if name in (None, ""):
        return default
    if not isinstance(name, str):
        raise ApiError(f"sd_model_checkpoint must be the name of a model, not {shown(name)}", "sd_model_checkpoint")
    return context.model(name.removesuffix(".safetensors")).name
