"""What the fleet keeps of its jobs and of its models."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
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

    @property
    def oldest(self) -> float:
        """When the first of the jobs that wait for it was accepted."""
        return self.pending[0].accepted if self.pending else math.inf


def has_room(models: Iterable[ModelState], wanted: ModelState, budget: int | None) -> bool:
    """Whether a model may be loaded; if not, the least recently used ones begin to make room, if they have enough.

    One with an older job goes on first: it would be loaded again before the wanted one.
    """
    loaded = [each for each in models if each.state != "absent"]
    if budget is None or wanted.share is None:
        return True
    free = budget - sum(each.share or 0 for each in loaded)
    if wanted.share <= free:
        return True
    free += sum(each.share or 0 for each in loaded if each.yields or each.state == "closing")
    newer = [each for each in loaded if each.state == "ready" and not each.yields and each.oldest > wanted.oldest]
    chosen = []
    for each in sorted(newer, key=lambda each: (bool(each.sent), each.used)):
        if wanted.share > free:
            chosen.append(each)
            free += each.share or 0
    if wanted.share <= free:
        for each in chosen:
            each.yields = True
    return False


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
