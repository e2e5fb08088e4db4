"""What the fleet keeps of its jobs and of its models."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Literal

from .engine.costs import StepCosts
from .engine.process import EngineProcess
from .job import Event, Failed, Finished, Job, Preview, Progress
from .served import Inspected


class FleetGeneration:
    """An accepted job, and the queue of its events."""

    def __init__(self, job: Job, on_cancel: Callable[[FleetGeneration], None]):
        self.job, self.on_cancel = job, on_cancel
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        self.accepted = time.perf_counter()
        self.attempts = 0
        self.step = self.preview = -1  # of the last events: an image that is run again does not go back
        self.cancelled = self.ended = False

    def is_new(self, event: Progress | Preview) -> bool:
        """Whether an event goes beyond the earlier ones. If so, later ones are compared with it."""
        if isinstance(event, Progress):
            new = event.step >= self.step
            self.step = max(self.step, event.step)
        else:
            new = event.number > self.preview
            self.preview = max(self.preview, event.number)
        return new

    def cancel(self) -> None:
        if not self.ended:
            self.on_cancel(self)

    async def events(self) -> AsyncGenerator[Event, None]:
        while True:
            event = await self.queue.get()
            yield event
            if isinstance(event, Finished | Failed):
                return


class ModelState:
    """A model: its engine if it is loaded, what waits for it and what it works on."""

    def __init__(self, inspected: Inspected, share: int | None):
        self.inspected, self.share = inspected, share
        self.name = inspected.served.name
        self.state: Literal["absent", "loading", "ready", "closing"] = "absent"
        self.process: EngineProcess | None = None
        self.costs: StepCosts | None = None
        self.pending: deque[FleetGeneration] = deque()  # not sent yet
        self.sent: dict[str, FleetGeneration] = {}
        self.used = 0.0
        self.yields = False  # it gets nothing more, and makes room for another model once it is idle
        self.error: str | None = None  # why it could not be loaded the last time
        self.loads = 0  # that were begun since it was ready


def given_bytes(job: Job) -> int:
    """Of the images to edit and the mask."""
    given = job.given
    return 0 if given is None else sum(len(image.pixels) for image in given.images) + len(given.mask or b"")


def cancelled(generation: FleetGeneration) -> Failed:
    return Failed(generation.job.id, "cancelled", "the client has cancelled it")


def deadline_of(generation: FleetGeneration) -> float:
    return math.inf if generation.job.deadline is None else generation.job.deadline


def too_late(generation: FleetGeneration) -> Failed:
    return Failed(generation.job.id, "deadline", "the image was not done in time")
