"""Images as users give them: files, PIL images, arrays and tensors, checked and brought to one form.

A file is looked at before it is opened and measured before it is decoded, and only the decoders named here see it.
"""

from __future__ import annotations

import logging
import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, WebPImagePlugin  # noqa: F401  (known to Pillow when imported)
from torch import Tensor

from ..checkpoints.stored import FLOATS
from ..checks import shown
from ..errors import ImpastoError, InputError
from ..files import plain_path
from . import limits

logger = logging.getLogger("impasto")

#: Each is decoded inside this process: no EPS, which starts Ghostscript, and no TIFF with its dozens of codecs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
#: How far floats may lie outside of their range: a trace of rounding, not another range.
_ROUNDING = 0.01
#: Of all images of a call: eight of the largest, in grey.
_MOST_VALUES = 8 * limits.PIXELS
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """The first image of a file as RGB: upright as its EXIF orientation says, transparency on white.

    Raises:
        InputError: not a regular file, none of ``FORMATS``, too large, or damaged.
    """
    return to_rgb(load_image(path, upright=True))


def load_image(path: str | os.PathLike[str], upright: bool = False) -> Image.Image:
    """The first image of a file, decoded, in the mode that the file has; ``info`` holds its texts."""
    path = plain_path(path, InputError)
    try:
        with _regular_file(path) as file, Image.open(file, formats=FORMATS) as image:
            _check_pixels(image.size)
            image.load()  # texts of a PNG may follow the pixels
            return ImageOps.exif_transpose(image) if upright else image
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        problem = f"it is none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else _reason(error)
        raise InputError(f"{shown(str(path), 200)} cannot be read as an image: {problem}") from error


def _regular_file(path: Path) -> BinaryIO:
    """Open what is a file on a disk and of a sensible size: reading anything else may block or never end."""
    _check_file(os.stat(path))  # opening a device may itself have effects
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_file(os.fstat(descriptor))  # it may be another one by now
    except InputError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _check_file(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'not a file')}; give a file")
    if found.st_size > limits.FILE_BYTES:
        raise InputError(f"it has {found.st_size:,} bytes, and at most {limits.FILE_BYTES:,} are read")


def _check_pixels(size: tuple[int, int]) -> None:
    if size[0] * size[1] > limits.PIXELS:
        raise InputError(f"an image of {size[0]} x {size[1]} pixels is too large; scale it to {limits.PIXELS:,} pixels")


def _reason(error: Exception) -> str:
    if isinstance(error, ImpastoError):
        return str(error)
    return shown((isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__, 200)[1:-1]


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as 8-bit RGB, transparency on white.

    16-bit grey is scaled by 1 / 257. Whole 32-bit numbers (mode I) are levels up to 255, or 16-bit ones where they
    exceed that; floats (mode F) are levels up to 255, or shares of white where none exceeds 1.

    Raises:
        InputError: values outside of these ranges, a mode without a conversion, too many pixels, or damaged data.
    """
    _check_pixels(image.size)
    try:
        image.load()
        if image.mode[0] in "IF":
            image = _levels(image)
        if image.mode in ("La", "RGBa"):  # premultiplied
            image = image.convert(image.mode.upper())
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, ValueError) as error:
        raise InputError(f"the image of mode {image.mode} cannot be made RGB: {_reason(error)}") from error


def _levels(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as 8-bit grey."""
    values = np.asarray(image).astype(np.float32)
    least, most = float(values.min()), float(values.max())
    if image.mode == "F":
        full = 1.0 if most <= 1 else 255.0
    else:
        full = 255.0 if image.mode == "I" and most <= 255 else 65535.0
    if not 0 <= least <= most <= full:  # NaN neither
        raise InputError(f"its values, from {least:g} to {most:g}, are not from 0 to {full:g}")
    return Image.fromarray((values * (255 / full)).round().astype(np.uint8))


def as_batch(image: Any) -> Tensor:
    """An array [(B,) H, W (, C)] or a tensor [(B,) (C,) H, W] as a tensor [B, C, H, W] of the same numbers.

    Raises:
        InputError: another shape, too many pixels, or values that are not real numbers in memory.
    """
    check_arrays([image])
    if isinstance(image, Tensor):
        image = image if image.is_floating_point() or image.dtype == torch.uint8 else image.long()
        image = image[None] if image.ndim == 2 else image
        batch: Tensor = image[None] if image.ndim == 3 else image
    else:
        plain = {"u": np.int64, "i": np.int64, "f": np.float64 if image.itemsize > 4 else np.float32}
        array = image if image.dtype == np.uint8 else image.astype(plain[image.dtype.kind])
        array = array[..., None] if array.ndim == 2 else array
        array = array[None] if array.ndim == 3 else array
        batch = torch.from_numpy(np.array(array.transpose(0, 3, 1, 2)))
    return batch


def check_arrays(images: Sequence[Any]) -> None:
    """Whether arrays and tensors are images, before any of them is copied: one that repeats values can claim any size.

    Raises:
        InputError: as ``as_batch``.
    """
    for image in images:
        if isinstance(image, Tensor):
            name = str(image.dtype).removeprefix("torch.")
            if image.is_meta or image.is_nested or image.layout != torch.strided or name not in (*FLOATS, *_INTEGERS):
                kind = "meta" if image.is_meta else f"{image.layout}, {image.dtype}"
                raise InputError(f"an image must be a dense tensor of floats or integers, not {kind}")
        elif image.dtype.kind not in "uif":
            raise InputError(f"an image must be an array of floats or integers, not {image.dtype}")
        shape = list(image.shape)
        if not 2 <= len(shape) <= 4:
            raise InputError(f"an image has 2 to 4 dimensions, not the shape {shape}")
        if 0 in shape:
            raise InputError(f"an image of shape {shape} is empty")
        height, width = shape[-2:] if isinstance(image, Tensor) or len(shape) == 2 else shape[-3:-1]
        _check_pixels((width, height))
    values = sum(math.prod(image.shape) for image in images)
    if values > _MOST_VALUES:
        raise InputError(f"images of {values:,} values are too large; at most {_MOST_VALUES:,} are taken at once")


def normalize(images: Tensor) -> Tensor:
    """Images in [-1, 1], from integers in [0, 255] or floats in [0, 1]; floats in [-1, 1] stay, with a warning.

    Raises:
        InputError: values in none of these ranges.
    """
    least, most = images.min().item(), images.max().item()
    if not images.is_floating_point():
        if least < 0 or most > 255:
            raise InputError(f"images of integers must be in [0, 255], not in [{least}, {most}]; scale them")
        return 2.0 * (images.float() / 255) - 1.0
    if not -1 - _ROUNDING <= least <= most <= 1 + _ROUNDING:  # NaN neither
        raise InputError(
            f"images of floats must be in [0, 1] or [-1, 1], not in [{least:g}, {most:g}]; scale them, or give "
            f"integers in [0, 255]"
        )
    if least < 0:
        logger.warning("images to encode should be in [0, 1]; these have negative values, taken as in [-1, 1]")
        return images
    return 2.0 * images - 1.0


def unit_range(images: Tensor) -> Tensor:
    """Images in [0, 1], from what ``normalize`` takes; floats that are in [0, 1] are returned unchanged."""
    signed = normalize(images)
    if not images.is_floating_point():
        return images.float() / 255
    return images if bool((images >= 0).all()) else signed * 0.5 + 0.5
