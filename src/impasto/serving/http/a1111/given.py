"""Images and masks as ``img2img`` gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ....errors import InputError
from ....pipelines.images import to_rgb
from ...job import GivenImages
from ...served import ServedModel
from .. import uploads

DEFAULT_STRENGTH, DEFAULT_BLUR, DEFAULT_PADDING = 0.75, 4, 0
_STRETCH, _CROP, _FILL = 0, 1, 2  # resize_mode; 3, a resize of latents, is taken for the first


def read_given(model: ServedModel, given: dict[str, Any], most_pixels: int) -> tuple[list[GivenImages], int, int]:
    """What is edited, one entry for each image that is given, and the width and height of generation.

    A mask's white pixels are repainted (its black ones if ``inpainting_mask_invert``), softly over about ``mask_blur``
    pixels. With ``inpaint_full_res``, what surrounds the mask is generated alone and pasted into the given image;
    otherwise image and mask are resized to the size of generation.

    Args:
        given: the fields of a request, checked.
        most_pixels: of an image that is given.

    Raises:
        InputError: images or masks that cannot be used, or a size that the model does not generate.
    """
    uploads.check_given(model, 1, masked="mask" in given)
    images = [_decode(text, "init_images", most_pixels) for text in given["init_images"]]
    # As many pixels in all as one image may have: a hundred small files could otherwise hold gigabytes.
    if sum(image.width * image.height for image in images) > max(most_pixels, len(images) * model.most_pixels):
        raise InputError("init_images have too many pixels together; give fewer or smaller ones")
    mask = _decode(given["mask"], "mask", most_pixels) if "mask" in given else None
    suggested = uploads.size_for(model, *images[0].size)
    width, height = given.get("width", suggested[0]), given.get("height", suggested[1])
    uploads.check_size(model, width, height)
    mode, strength = given.get("resize_mode", _STRETCH), given.get("denoising_strength", DEFAULT_STRENGTH)
    if mask is None:
        if model.most_images > 1:  # references, which are not of the size of the result
            fitted = [uploads.fit(image, *uploads.size_for(model, *image.size)) for image in images]
        else:
            fitted = [resized(image, width, height, mode) for image in images]
        return [GivenImages((uploads.raw(image),), None, strength) for image in fitted], width, height
    white = uploads.white_mask(mask, given.get("inpainting_mask_invert", False))
    uploads.check_mask(white, images[0], same_size=False)
    blur = given.get("mask_blur", DEFAULT_BLUR)
    radius = (given.get("mask_blur_x", blur), given.get("mask_blur_y", blur))
    found = []
    for image in images:
        levels = uploads.fit_mask(white, *image.size).filter(ImageFilter.GaussianBlur(radius))
        padding = None
        if given.get("inpaint_full_res", True):
            padding = given.get("inpaint_full_res_padding", DEFAULT_PADDING)
        else:
            image, levels = resized(image, width, height, mode), resized(levels, width, height, mode, uploads.fit_mask)
        if levels.getextrema()[1] == 0:
            raise InputError("the mask selects nothing of what is left of the image; blur it less, or resize otherwise")
        found.append(GivenImages((uploads.raw(image),), levels.tobytes(), strength, padding))
    return found, width, height


def _decode(text: str, name: str, most_pixels: int) -> Image.Image:
    return uploads.decode_upload(uploads.from_base64(text, name), name, most_pixels)


def resized(
    image: Image.Image,
    width: int,
    height: int,
    mode: int,
    fit: Callable[[Image.Image, int, int], Image.Image] = uploads.fit,
) -> Image.Image:
    """The image at this size: stretched, cropped to its centre, or whole with its edges continued."""
    if mode not in (_CROP, _FILL):
        return fit(image, width, height)
    scales = width / image.width, height / image.height
    scale = max(scales) if mode == _CROP else min(scales)
    if mode == _CROP:
        wide, high = min(image.width, round(width / scale)), min(image.height, round(height / scale))
        left, top = (image.width - wide) // 2, (image.height - high) // 2
        return fit(image.crop((left, top, left + max(1, wide), top + max(1, high))), width, height)
    inner = fit(image, max(1, min(width, round(image.width * scale))), max(1, min(height, round(image.height * scale))))
    left, top = (width - inner.width) // 2, (height - inner.height) // 2
    pixels = np.asarray(inner if inner.mode == "L" else to_rgb(inner))
    borders = [(top, height - inner.height - top), (left, width - inner.width - left), (0, 0)]
    return Image.fromarray(np.pad(pixels, borders[: pixels.ndim], mode="edge"))
