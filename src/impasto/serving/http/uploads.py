"""Images and masks that clients give: as bytes, never as paths or addresses. Shared by all interfaces.

Masks arrive in three conventions and leave in one: a grey image, white where it is repainted.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence

from PIL import Image, ImageOps

from ...checks import MAX_SIDE
from ...errors import InputError
from ...pipelines.image_files import decode_image, measure_image
from ...pipelines.images import to_rgb
from ..job import GivenImages, RawImage
from ..served import ServedModel

_DATA_URI = re.compile(r"data:[\w.+/-]{0,80}(;[\w=.-]{1,80}){0,3},", re.ASCII)


# --- images ---


def decode_upload(content: bytes, name: str, most_pixels: int) -> Image.Image:
    """An image file from a client, upright, in the mode of the file. It is measured before it is decoded.

    Args:
        name: what errors call it; the client's name for the file is not used.

    Raises:
        InputError: it is no image, damaged, or has more pixels than ``most_pixels``.
    """
    height, width = measure_image(io.BytesIO(content), name)
    if height * width > most_pixels:
        raise InputError(f"{name} has {width} x {height} pixels; at most {most_pixels:,} are accepted")
    return decode_image(io.BytesIO(content), name, upright=True)


def from_base64(text: str, name: str) -> bytes:
    """The bytes of base64, alone or in a data URI. Other URIs, and paths, are not opened.

    Raises:
        InputError: it is not base64.
    """
    uri = _DATA_URI.match(text[:400])
    if uri is None and re.match(r"[A-Za-z][\w+.-]*:", text[:40]):
        raise InputError(f"{name} is an address, and none is opened; give the image itself, as base64 or a data URI")
    if uri is not None and ";base64" not in uri[0]:
        raise InputError(f"{name} is a data URI without ;base64; encode it")
    try:
        return base64.b64decode(re.sub(r"\s+", "", text[uri.end() :] if uri else text), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{name} is not base64: {error}") from error


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image at this size."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def fit_mask(mask: Image.Image, width: int, height: int) -> Image.Image:
    """The mask at this size. Other filters than this one would mark pixels far from its edges."""
    return mask if mask.size == (width, height) else mask.resize((width, height), Image.Resampling.BOX)


def raw(image: Image.Image) -> RawImage:
    """An image as it crosses processes, transparency on white."""
    rgb = to_rgb(image)
    return RawImage(rgb.width, rgb.height, rgb.tobytes())


def size_for(model: ServedModel, width: int, height: int) -> tuple[int, int]:
    """The width and height of an image of any size as the model can generate it: scaled down where it is too large."""
    side = longest_side(model)
    scale = min(1.0, (model.most_pixels / (width * height)) ** 0.5, side / width, side / height)
    return max(1, int(width * scale)), max(1, int(height * scale))


def longest_side(model: ServedModel) -> int:
    """The longest side of an image of a model, in pixels."""
    return min(MAX_SIDE, model.most_side or 2 * int(model.most_pixels**0.5))


def check_size(model: ServedModel, width: int, height: int) -> None:
    """Raise InputError for a size that the model does not generate."""
    side = longest_side(model)
    if min(width, height) < 1 or max(width, height) > side or width * height > model.most_pixels:
        raise InputError(
            f"{width}x{height} is too large for {model.name}: at most {side} pixels along a side "
            f"and {model.most_pixels:,} in all"
        )


# --- masks ---


def transparent_mask(mask: Image.Image) -> Image.Image | None:
    """OpenAI's convention: transparent pixels are repainted. None if the mask has no transparency channel."""
    if not mask.has_transparency_data:
        return None
    return ImageOps.invert(mask.convert("RGBA").getchannel("A"))


def white_mask(mask: Image.Image, inverted: bool = False) -> Image.Image:
    """A1111's convention and ours: white pixels are repainted; black ones if it is inverted.

    Transparent pixels count as black.
    """
    grey = to_rgb(mask, "black").convert("L")
    return ImageOps.invert(grey) if inverted else grey


def check_mask(mask: Image.Image, image: Image.Image, *, same_size: bool = True) -> None:
    """Raise InputError for a mask that selects nothing, or, if asked, of another size than the image."""
    if same_size and mask.size != image.size:
        sizes = " and ".join(f"{one.width} x {one.height}" for one in (mask, image))
        raise InputError(f"mask and image have different sizes, {sizes}; give a mask of the image's size")
    if mask.getextrema()[1] == 0:
        raise InputError("the mask selects nothing; transparent pixels are repainted, or white ones if none can be")


def check_given(model: ServedModel, count: int, *, masked: bool) -> None:
    """Raise InputError if the model does not edit so many images, or takes no mask. Checked before any is decoded."""
    if not model.edits:
        raise InputError(f"{model.name} edits no images")
    if masked and not model.masks:
        raise InputError(f"{model.name} takes no mask; describe in the prompt what to change")
    if count > model.most_images:
        raise InputError(f"there are {count} images, and {model.name} takes at most {model.most_images}")


def given_images(
    model: ServedModel,
    images: Sequence[Image.Image],
    mask: Image.Image | None,
    size: tuple[int, int] | None,
    strength: float,
    padding: int | None = None,
) -> tuple[GivenImages, int, int]:
    """What a job edits, at the size of the result, and the width and height of the result.

    Args:
        images: as many as ``check_given`` allows.
        mask: grey, white where it is repainted, of any size.
        size: width and height; None: those of the first image, scaled down to what the model generates. With
            ``padding``, of what is generated around the mask; None: the model's.
        padding: without effect if there is no mask.

    Raises:
        InputError: a size that the model does not generate.
    """
    padding = None if mask is None else padding
    whole = size_for(model, *images[0].size)
    width, height = size or (whole if padding is None else (model.width, model.height))
    check_size(model, width, height)
    if padding is None and model.most_images == 1:
        whole = width, height
    found = [raw(fit(images[0], *whole)), *(raw(fit(image, *size_for(model, *image.size))) for image in images[1:])]
    levels = None if mask is None else fit_mask(mask, *whole).tobytes()
    return GivenImages(tuple(found), levels, strength, padding), width, height
