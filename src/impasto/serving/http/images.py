"""Generated images as files, with their settings and, if wanted, their provenance."""

from __future__ import annotations

import base64

from PIL import Image

from ...pipelines.image_files import GenerationSettings, encode_image
from ..job import RawImage
from .settings import HttpSettings

#: By the names of ``output_format``.
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
DEFAULT_QUALITY = 95


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
