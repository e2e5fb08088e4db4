"""Generated images as files, with their settings and, if wanted, their provenance."""

from __future__ import annotations

import base64
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from PIL import Image

from ...pipelines.image_files import GenerationSettings, encode_image
from ..job import Job, RawImage
from .settings import HttpSettings

#: By the names of ``output_format``.
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
DEFAULT_QUALITY = 95


def settings_of(job: Job, sampler: str) -> GenerationSettings:
    """How the image of a job was generated."""
    extra = {}
    if job.given is not None:
        extra["Denoising strength"] = f"{job.given.strength:g}"
    if job.adapters:
        extra["Lora"] = "; ".join(f"{adapter.name} {adapter.weight:g}" for adapter in job.adapters)
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


def encode(
    image: RawImage,
    kind: str = "png",
    quality: int = DEFAULT_QUALITY,
    settings: GenerationSettings | None = None,
    http: HttpSettings | None = None,
) -> bytes:
    """The file of an image. It takes a while: to be called in a thread.

    Args:
        kind: png, jpeg or webp.
        quality: of jpeg and webp, 1 to 100.
        settings: to be written into it, unless ``http`` says that images hold none.
        http: whose signer adds provenance.
    """
    found = Image.frombytes("RGB", (image.width, image.height), image.pixels)
    inside = settings if http is None or http.settings_in_images else None
    content = encode_image(found, kind.upper(), inside, max(1, quality))
    return content if http is None or http.signer is None else http.signer(content, MEDIA_TYPES[kind])


def base64_text(content: bytes) -> str:
    """A file in JSON."""
    return base64.b64encode(content).decode("ascii")


def _version() -> str:
    try:
        return f"impasto {installed_version('impasto')}"
    except PackageNotFoundError:
        return "impasto"
