"""From a request of ``txt2img`` or ``img2img`` to jobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ....errors import InputError
from ...job import GivenImages, Job
from ..context import Context
from ..errors import ApiError
from ..fields import Adapters
from ..running import deadline, new_id, random_seed
from ..uploads import check_size
from .calls import Session, chosen_model
from .fields import read_known
from .given import read_given
from .prompts import without_tags
from .samplers import scheduler_of


@dataclass(frozen=True)
class WantedImages:
    """What a client wants: a job for each image.

    Attributes:
        prompt, negative_prompt: as they were given, with their tags.
        sampler: the name that the client used.
        batch_size: as it was given; for the answer.
        fields: all that were understood, without the images, which would be kept until the answer.
    """

    jobs: list[Job]
    prompt: str
    negative_prompt: str
    sampler: str
    batch_size: int
    send_images: bool
    fields: dict[str, Any]


def read_wanted(context: Context, session: Session, fields: dict[str, Any], body: dict[str, Any]) -> WantedImages:
    """The jobs of a request. It decodes images: to be called in a thread.

    Raises:
        ApiError, InputError: a value that cannot be used, or that asks for what is absent.
    """
    given = read_known(fields, body)
    batch_size, batches = given.get("batch_size", 1), given.get("n_iter", 1)
    options = given.get("override_settings", {})
    model = context.model(chosen_model(context, options, session.model))
    prompt, negative = given.get("prompt", ""), given.get("negative_prompt", "")
    served = Adapters(tuple(context.service.adapters))
    try:
        plain, chosen = without_tags(prompt, served)
        plain_negative, _ = without_tags(negative, served)
        edits: list[GivenImages | None] = [None]
        width, height = given.get("width", model.width), given.get("height", model.height)
        if "init_images" in fields:
            if "init_images" not in given:
                raise ApiError("init_images is missing: the images to edit", "init_images", status=404)
            edited, width, height = read_given(model, given, context.settings.max_upload_pixels)
            edits = [*edited]
            given |= {"init_images": None, "mask": None}
            if len(edits) > 1 and batch_size < len(edits):
                batch_size = len(edits)
        check_size(model, width, height)
    except InputError as error:
        raise ApiError(str(error), code="invalid_value") from error
    count = batch_size * batches
    if count > context.settings.max_images:
        most = context.settings.max_images
        raise ApiError(f"batch_size times n_iter is {count}; at most {most} images are generated at once", "batch_size")
    adapters, defaults = context.adapters(model, chosen)
    sampler = given.get("sampler_name") or given.get("sampler_index")
    scheduler = scheduler_of(sampler, model) or defaults.scheduler
    steps = min(given.get("steps", defaults.steps), context.settings.max_steps)
    seed = given.get("seed", -1)
    first = random_seed() if seed == -1 else seed
    previews = session.previews_of(steps)
    jobs = [
        Job(
            id=new_id(),
            model=model.name,
            prompt=plain,
            negative_prompt=plain_negative,
            width=width,
            height=height,
            steps=steps,
            guidance_scale=given.get("cfg_scale", defaults.guidance_scale),
            seed=first + i,
            scheduler=scheduler,
            adapters=adapters,
            given=edits[i % batch_size % len(edits)],
            previews=previews,
            deadline=deadline(context.settings.deadline_seconds),
        )
        for i in range(count)
    ]
    name = sampler or jobs[0].scheduler or model.scheduler
    return WantedImages(jobs, prompt, negative, name, batch_size, given.get("send_images", True), given)
