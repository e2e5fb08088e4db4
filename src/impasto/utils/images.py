"""Images from files and addresses, grids, and animations."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from ..checks import MAX_FILE_BYTES, MAX_SIDE, shown, whole_number
from ..errors import HubError, InputError
from ..files import plain_path, write_file
from ..pipelines.image_files import load_image as read_image
from ..pipelines.images import ImageProcessor, check_pixels, reason, to_rgb

#: How long a download may take, in seconds.
_MOST_SECONDS = 60.0


def load_image(
    image: str | os.PathLike[str] | Image.Image, convert_method: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """An image as RGB: upright as its EXIF orientation says, transparency on white.

    Args:
        image: a file, an address that starts with ``http://`` or ``https://``, or a PIL image.
        convert_method: what converts it in place of RGB.

    Raises:
        InputError: not an image, or a file that is missing, damaged or too large.
        HubError: the address cannot be downloaded, at all or in a minute.
    """
    if isinstance(image, Image.Image):
        found = ImageOps.exif_transpose(image)
    elif isinstance(image, str) and image.startswith(("http://", "https://")):
        found = _download(image)
    else:
        found = read_image(image, upright=True)
    return to_rgb(found) if convert_method is None else convert_method(found)


def _download(address: str) -> Image.Image:
    from huggingface_hub import get_session

    content, end = bytearray(), time.monotonic() + _MOST_SECONDS
    try:
        with get_session().stream("GET", address, timeout=10.0, follow_redirects=True) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_FILE_BYTES:
                    raise InputError(f"it has more than {MAX_FILE_BYTES:,} bytes")
                if time.monotonic() > end:
                    raise TimeoutError(f"it takes more than {_MOST_SECONDS:.0f} seconds")
    except MemoryError:
        raise
    except Exception as error:  # of the library for HTTP, whose classes depend on its version
        raise HubError(f"{shown(address, 200)} cannot be downloaded: {reason(error)}; give the file") from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        path.write_bytes(content)
        return read_image(path, upright=True)


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """One image of all images, row by row, each as large as the first.

    Args:
        resize: the side in pixels to scale each to.
    """
    rows, cols = whole_number("rows", rows), whole_number("cols", cols)
    if len(images) != rows * cols:
        raise InputError(f"there are {len(images)} images for {rows} x {cols} places; give as many as there are places")
    if resize is not None:
        side = whole_number("resize", resize, most=MAX_SIDE)
        images = [image.resize((side, side)) for image in images]
    width, height = images[0].size
    check_pixels((cols * width, rows * height))
    grid = Image.new("RGB", (cols * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % cols * width, i // cols * height))
    return grid


def export_to_gif(
    image: Sequence[Image.Image], output_gif_path: str | os.PathLike[str] | None = None, fps: int = 10
) -> str:
    """Write images as an animation, and return its path; a new temporary file if none is given."""
    if not image:
        raise InputError("there is no image to write")
    fps, buffer = whole_number("fps", fps, most=100), io.BytesIO()
    image[0].save(buffer, "GIF", save_all=True, append_images=list(image[1:]), duration=1000 // fps, loop=0)
    if output_gif_path is None:
        descriptor, output_gif_path = tempfile.mkstemp(suffix=".gif")
        os.close(descriptor)
    path = plain_path(output_gif_path)
    write_file(path, buffer.getvalue())
    return str(path)


def numpy_to_pil(images: Any) -> list[Image.Image]:
    """An array [B, H, W, C] or [H, W, C] in [0, 1] to PIL images."""
    return ImageProcessor.numpy_to_pil(images)


def pt_to_pil(images: Tensor) -> list[Image.Image]:
    """A tensor [B, C, H, W] in [-1, 1] to PIL images."""
    return ImageProcessor.numpy_to_pil(ImageProcessor.pt_to_numpy(ImageProcessor.denormalize(images)))
