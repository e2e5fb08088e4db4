"""A service without a model, for tests of interfaces: images of a colour that depends on the job, at once."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence

from .job import Event, Failed, Finished, Job, Preview, Progress, RawImage, Reason
from .served import ServedModel
from .service import Generation, QueueFullError, UnavailableError
from .stats import Stats

SCENES = ServedModel(
    name="scenes", family="PixArt-Σ", width=64, height=64, multiple=8, unit=8, most_pixels=1 << 20,
    steps=20, guidance_scale=4.5, scheduler="dpm++", schedulers=("dpm++", "ddim", "ddpm", "lcm"), edits=True,
    masks=True, created=1_790_000_000, most_side=1024,
)  # fmt: skip


class StubService:
    """A ``Service``.

    Args:
        seconds: of a step.
        waiting: how many jobs may be unfinished.
    """

    def __init__(self, seconds: float = 0.0, waiting: int = 64, models: Sequence[ServedModel] = (SCENES,)):
        self.models: Mapping[str, ServedModel] = {model.name: model for model in models}
        self.aliases: Mapping[str, str] = {"dall-e-3": models[0].name}
        self.adapters: Mapping[str, str] = {"style": "style.safetensors"}
        self.stats = Stats()
        self.ready = True
        self.seconds, self.waiting = seconds, waiting
        self.unfinished: dict[str, StubGeneration] = {}
        self.submitted: list[Job] = []

    def submit(self, jobs: Sequence[Job]) -> list[Generation]:
        if not self.ready:
            raise UnavailableError("the server is ending; try again in some seconds", 5)
        if len(self.unfinished) + len(jobs) > self.waiting:
            self.stats.rejected["full"] += len(jobs)
            raise QueueFullError("too many images wait; try again later", 2)
        generations = [StubGeneration(job, self) for job in jobs]
        self.submitted += jobs
        self.stats.accepted += len(jobs)
        self.unfinished |= {generation.job.id: generation for generation in generations}
        return [*generations]

    async def drain(self) -> None:
        self.ready = False
        while self.unfinished:
            await asyncio.sleep(0.01)

    def give_up(self) -> None:
        for generation in self.unfinished.values():
            generation.ended = "shutdown"


class StubGeneration:
    """A ``Generation``."""

    def __init__(self, job: Job, service: StubService):
        self.job, self.service = job, service
        self.ended: Reason | None = None

    def cancel(self) -> None:
        self.ended = "cancelled"
        self.service.unfinished.pop(self.job.id, None)

    async def events(self) -> AsyncGenerator[Event, None]:
        job, shown, seconds = self.job, 0, self.service.seconds
        try:
            for step in range(job.steps + 1):
                if self.ended:
                    message = "the client has cancelled it" if self.ended == "cancelled" else "the server ends"
                    yield Failed(job.id, self.ended, message)
                    return
                yield Progress(job.id, step, job.steps, (job.steps - step) * seconds)
                if step and shown < job.previews and step * (job.previews + 1) >= (shown + 1) * job.steps:
                    yield Preview(job.id, shown, _image(job, step))
                    shown += 1
                await asyncio.sleep(seconds)
            self.service.stats.images += 1
            self.service.stats.latency.add(job.steps * seconds)
            yield Finished(job.id, _image(job, job.steps), {"denoise": job.steps * seconds})
        finally:
            self.service.unfinished.pop(job.id, None)


def _image(job: Job, step: int) -> RawImage:
    colour = hashlib.sha256(f"{job.prompt} {job.seed} {step}".encode("utf-8", "replace")).digest()[:3]
    pasted = job.given.images[0] if job.given and job.given.padding is not None else job
    width, height = pasted.width, pasted.height
    return RawImage(width, height, colour * (width * height))
