"""What is written into an image about how it was generated."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from ..pipelines.image_files import GenerationSettings
from .job import Job


def settings_of(job: Job, sampler: str) -> GenerationSettings:
    """How the image of a job was generated."""
    extra = {}
    if job.given is not None:
        extra["Denoising strength"] = f"{job.given.strength:g}"
    if job.adapters:
        extra["Lora"] = "; ".join(f"{adapter.name} {adapter.weight:g}" for adapter in job.adapters)
    if not job.binning:
        extra["Binning"] = "off"
    return GenerationSettings(
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        steps=job.steps,
        sampler=job.scheduler or sampler,
        guidance_scale=job.guidance_scale,
        seed=job.seed,
        height=job.height,
        width=job.width,
        model=job.model,
        extra=extra | {"Version": _version()},
    )


def _version() -> str:
    try:
        return f"impasto {installed_version('impasto')}"
    except PackageNotFoundError:
        return "impasto"
