"""Images of records by an engine in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from PIL import Image

from ...errors import ImpastoError
from ...pipelines.image_files import encode_image, load_image, open_image
from ...pipelines.images import to_rgb
from ..engine.loop import Engine
from ..engine.stages import to_pil
from ..image_settings import settings_of
from ..job import Failed, Finished, GivenImages, Job, RawImage
from .records import Record
from .run import Generate, Made


def by_engine(engine: Engine, model: str, scheduler: str, at_once: int, *, within_budget: bool = False) -> Generate:
    """What generates the images of records.

    Args:
        model: its name, as images state it.
        scheduler: the model's, by its name.
        at_once: images that have begun and are not done.
        within_budget: whether the sizes of all records fit a budget. Otherwise images that are larger than the model's
            own and do not fit the free memory fail.
    """

    def generate(records: Sequence[Record]) -> Iterator[Made]:
        coming, running = iter(records), dict[str, tuple[Record, Job]]()
        while True:
            while len(running) < at_once and (record := next(coming, None)) is not None:
                try:
                    job = job_of(record, model)
                except ImpastoError as error:  # an image has changed since it was checked
                    yield Made(record, error=str(error))
                    continue
                if not within_budget and not _fits(engine, job):
                    yield Made(record, error=f"{job.width} x {job.height} pixels do not fit the memory of this machine")
                    continue
                running[job.id] = (record, job)
                engine.add(job)
            if not running:
                return
            for event in engine.tick()[0]:
                if isinstance(event, Finished):
                    record, job = running.pop(event.id)
                    png = encode_image(to_pil(event.image), "PNG", settings_of(job, scheduler))
                    yield Made(record, png, sum(event.seconds.values()) - event.seconds.get("wait", 0.0))
                elif isinstance(event, Failed):
                    yield Made(running.pop(event.id)[0], error=event.message)

    return generate


def job_of(record: Record, model: str) -> Job:
    """The job of a record, with its images.

    Raises:
        InputError: an image or the mask cannot be read.
    """
    given = None
    if record.images:
        images = tuple(_raw(open_image(path)) for path in record.images)
        mask = None
        if record.mask is not None:
            mask = to_rgb(load_image(record.mask, upright=True), "black").convert("L").tobytes()
        given = GivenImages(images, mask, record.strength)
    return Job(
        record.id,
        model,
        record.prompt,
        record.negative_prompt,
        record.width,
        record.height,
        record.steps,
        record.guidance_scale,
        record.seed,
        record.scheduler,
        record.adapters,
        given,
    )


def _fits(engine: Engine, job: Job) -> bool:
    """By an estimate; an image of the model's size is tried in any case."""
    need = engine.need(job)
    return need <= engine.room or need <= engine.need(replace(job, width=0, height=0))


def _raw(image: Image.Image) -> RawImage:
    return RawImage(image.width, image.height, image.tobytes())
