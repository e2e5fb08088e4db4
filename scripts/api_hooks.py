"""What Schemathesis cannot invent: images of one size, as files and as base64."""

from __future__ import annotations

import base64
import io

import schemathesis
from hypothesis import strategies
from PIL import Image


def image(level: int) -> bytes:
    """A PNG with some transparent pixels, which is an image and a mask of its size."""
    found = Image.new("RGBA", (16, 16), (level, 255 - level, 0, 255))
    found.paste((0, 0, 0, 0), (0, 0, 8, 8))
    file = io.BytesIO()
    found.save(file, "PNG")
    return file.getvalue()


images = strategies.integers(0, 255).map(image)
schemathesis.openapi.media_type("image/png", images)
schemathesis.openapi.format("binary", images)
schemathesis.openapi.format("byte", images.map(lambda content: base64.b64encode(content).decode()))


@schemathesis.hook
def filter_case(context, case):  # type: ignore[no-untyped-def]
    """Leave out the one case of forms with files that Schemathesis fills with empty texts and takes for valid."""
    body = case.body
    return not (isinstance(body, dict) and set(body) == {"image", "mask", "prompt"} and body["prompt"] == "")
