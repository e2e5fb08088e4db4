"""The images and masks of an edit: checked, brought to the size of generation, and pasted back.

Shapes: n images, B generated ones, H x W pixels of an image as it was given, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..checks import MAX_SIDE, shown, whole_number
from ..errors import InputError
from . import inputs
from .images import ImageProcessor, as_batch, check_arrays, to_rgb, unit_range
from .inputs import Canvas
from .resolution import bins_for

KINDS = (Image.Image, np.ndarray, Tensor)


class Box(NamedTuple):
    """A region of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: Tensor) -> Tensor:
        """This region of [..., H, W], a view."""
        return image[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Originals:
    """The images that a call edits, and what of them is repainted."""

    images: list[Tensor]  # [3, H, W] in [0, 1], or latents [C, h, w]
    canvas: Canvas
    latents: bool = False  # whether the images are latents
    masks: list[Tensor] | None = None  # [1, H, W] in [0, 1], one for each image: 1 is repainted
    boxes: list[Box] | None = None  # the regions that are generated, then pasted back; None: whole images, not pasted

    def __len__(self) -> int:
        return len(self.images)

    def to_encode(self) -> Tensor:
        """Images [n, 3, height, width] in [-1, 1] at the size of generation, or the latents [n, C, h, w]."""
        if self.latents:
            return torch.stack(self.images)
        size = self.canvas[:2]
        return torch.cat([resize(image[None], *size) for image in self._regions(self.images)]) * 2.0 - 1.0

    def latent_masks(self, height: int, width: int) -> Tensor | None:
        """Masks [n, 1, h, w] of latents: each has the largest value of the pixels that it covers."""
        if self.masks is None:
            return None
        return torch.stack([F.adaptive_max_pool2d(mask, (height, width)) for mask in self._regions(self.masks)])

    def finished(self, images: Tensor) -> Tensor:
        """Generated images [B, 3, height, width] in [0, 1] as they are returned: resized, or pasted back."""
        if self.boxes is None:
            return resize(images, *self.canvas[2:])
        assert self.masks is not None
        repeats = len(images) // len(self)
        finished = []
        for i, image in enumerate(images.float()):
            box, mask = self.boxes[i // repeats], self.masks[i // repeats].to(images.device)
            whole = self.images[i // repeats].to(images.device, torch.float32, copy=True)
            region, new = box.cut(whole), resize(image[None], box.height, box.width)[0]
            region.copy_(torch.lerp(region, new, box.cut(mask)))  # exactly the original where the mask is 0
            finished.append(whole)
        return torch.stack(finished)

    def _regions(self, images: Sequence[Tensor]) -> list[Tensor]:
        return list(images) if self.boxes is None else [box.cut(x) for box, x in zip(self.boxes, images, strict=True)]


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Scale images [B, 3, H, W] in [0, 1], with antialiasing."""
    if images.shape[-2:] == (height, width):
        return images
    scaled = F.interpolate(images.float(), (height, width), mode="bicubic", antialias=True, align_corners=False)
    return scaled.clamp(0, 1)


def read_originals(pipe: Any, arguments: Mapping[str, Any]) -> Originals:
    """The images and masks of a call.

    Raises:
        InputError: something that is not an image or a mask, sizes that do not match, or a mask that selects nothing.
    """
    config, factor = pipe._require("transformer").config, pipe.vae_scale_factor
    scheduler = pipe._require("scheduler")
    if not (hasattr(scheduler, "add_noise") or hasattr(scheduler, "scale_noise")):
        raise InputError(f"{type(scheduler).__name__} has no add_noise, which edits need; use another scheduler")
    images, latents = read_images(arguments["image"], config["in_channels"])
    sides = (arguments["height"], arguments["width"])
    padding, overlay = arguments.get("padding_mask_crop"), bool(arguments.get("overlay"))
    masks = None
    if "mask_image" in arguments:
        scale = factor if latents else 1
        masks = read_masks(arguments["mask_image"], *(scale * side for side in images[0].shape[-2:]))
        count = max(len(images), len(masks))
        images, masks = _as_many("images", images, count), _as_many("masks", masks, count)
    pastes = overlay or padding is not None
    if pastes and (latents or arguments["output_type"] == "latent"):
        raise InputError("padding_mask_crop and overlay need images: give no latents, and output_type='pil' or 'pt'")
    sizes = sorted({tuple(image.shape[-2:]) for image in images})
    if len(sizes) > 1 and (latents or masks is not None or None in sides):
        first, last = (" x ".join(map(str, size)) for size in (sizes[0], sizes[-1]))
        raise InputError(f"the images have different sizes, {first} and {last}; edit them in separate calls")
    if latents:
        height, width = (side * factor for side in sizes[0])
        if any(given not in (None, side) for given, side in zip(sides, (height, width))):
            raise InputError(f"latents of {height} x {width} pixels cannot be resized; leave height and width out")
        canvas = inputs.plan_canvas(height, width, 0, config["patch_size"] * factor, binning=False)
        return Originals(images, canvas, True, masks)
    boxes = None
    if pastes:
        assert masks is not None
        whole = Box(0, 0, *images[0].shape[-2:])
        boxes = [whole] * len(images) if padding is None else [_bounds(mask, padding) for mask in masks]
    size = tuple(images[0].shape[-2:]) if boxes is None else boxes[0][2:]
    base, unit = config["sample_size"] * factor, config["patch_size"] * factor
    canvas = _plan(size, sides, base, unit, bool(arguments["use_resolution_binning"]), padding is not None)
    if boxes is not None and padding is not None:
        boxes = [_widened(box, canvas, *images[0].shape[-2:]) for box in boxes]
    return Originals(images, canvas, False, masks, boxes)


def read_images(image: Any, channels: int) -> tuple[list[Tensor], bool]:
    """Images as given -> [3, H, W] in [0, 1] each, or latents [C, h, w]; and whether they are latents.

    Args:
        channels: of latents. A tensor that has as many is taken for latents.
    """
    found, kinds = [], set[bool]()
    for batch in _batches("image", image):
        latents = isinstance(batch, Tensor) and batch.ndim >= 3 and batch.shape[-3] == channels
        kinds.add(latents)
        if latents:
            batch = batch[None] if batch.ndim == 3 else batch
            inputs.check_tensor("image", batch, ("images", channels, "height", "width"))
        else:
            batch = unit_range(_as_batch(batch))
            if batch.shape[1] not in (1, 3):
                raise InputError(f"an image has 1 or 3 channels, not {batch.shape[1]} (shape {list(batch.shape)})")
            batch = batch.expand(-1, 3, -1, -1)
        found += batch.unbind()
    if len(kinds) > 1:
        raise InputError("image has both latents and images; give either")
    return found, True in kinds


def read_masks(mask: Any, height: int, width: int) -> list[Tensor]:
    """Masks as given -> [1, H, W] in [0, 1] each; integers are levels up to 255, or 0 and 1.

    Args:
        height, width: of the images, in pixels.
    """
    found: list[Tensor] = []
    for given in _batches("mask_image", mask):
        if isinstance(given, Image.Image):
            given = np.asarray(to_rgb(given).convert("L"))
        if given.dtype in (np.bool_, torch.bool):
            given = given.view(np.uint8 if isinstance(given, np.ndarray) else torch.uint8)
        if given.ndim == 3 and (isinstance(given, Tensor) or given.shape[-1] != 1):  # [n, H, W]
            given = given[:, None] if isinstance(given, Tensor) else given[..., None]
        batch = _as_batch(given)
        if batch.shape[1] != 1 or batch.shape[-2:] != (height, width):
            size = " x ".join(map(str, batch.shape[-2:]))
            raise InputError(
                f"mask_image has {batch.shape[1]} channels of {size} pixels for images of {height} x {width}; it must "
                f"have 1 channel and the size of the image"
            )
        whole = not batch.is_floating_point()
        most = batch.max().item()
        batch = batch.float() / 255 if whole and most > 1 else batch.float()
        if not 0 <= batch.min() <= batch.max() <= 1:  # NaN neither
            raise InputError("mask_image must have values from 0 to 1, or integers from 0 to 255")
        found += batch.unbind()
    for i, one in enumerate(found):
        if not bool(one.any()):
            which = f"mask_image[{i}]" if len(found) > 1 else "mask_image"
            raise InputError(f"{which} is black everywhere and selects nothing; white marks what is repainted")
    return found


def _batches(name: str, given: Any) -> list[Any]:
    """One image, array or tensor, or a list of them, as a list."""
    listed = list(given) if isinstance(given, list | tuple) else [given]
    if not listed or not all(isinstance(one, KINDS) for one in listed):
        raise InputError(f"{name} must be a PIL image, an array or a tensor, or a list of these, not {shown(given)}")
    return listed


def _as_batch(image: Any) -> Tensor:
    if isinstance(image, Image.Image):
        return ImageProcessor.numpy_to_pt(ImageProcessor.pil_to_numpy(to_rgb(image)))
    check_arrays([image])
    return as_batch(image)


def _as_many(what: str, given: list[Tensor], count: int) -> list[Tensor]:
    if len(given) not in (1, count):
        raise InputError(f"there are {len(given)} {what} and {count} are needed; give one for all, or one for each")
    return given * (count // len(given))


def _plan(
    size: Sequence[int], sides: tuple[int | None, int | None], base: int, unit: int, binning: bool, cropped: bool
) -> Canvas:
    """The size of generation, and the size that images have afterwards unless they are pasted back.

    Args:
        size: height and width in pixels of what is edited.
        sides: the requested height and width.
        base, unit, binning: as for ``plan_canvas``.
        cropped: whether the size of what is edited has been chosen by a mask.
    """
    height, width = (old if new is None else new for old, new in zip(size, sides))
    if sides != (None, None) or (binning and bins_for(base) is not None):
        return inputs.plan_canvas(height, width, base, unit, binning)
    # The area of a training image if the size is free, or about the size of what is edited.
    scale = base / math.sqrt(height * width) if binning or cropped else 1.0
    near = [max(1, round(side * scale / unit)) * unit for side in (height, width)]
    return Canvas(near[0], near[1], height, width)


def _bounds(mask: Tensor, padding: Any) -> Box:
    """The smallest box around what a mask [1, H, W] selects, with a padding of so many pixels."""
    padding = whole_number("padding_mask_crop", padding, least=0, most=MAX_SIDE)
    selected = mask[0] > 0
    ranges = []
    for lines in (selected.any(1), selected.any(0)):  # rows, columns
        places = lines.nonzero().flatten()
        first, last = int(places[0]) - padding, int(places[-1]) + padding + 1
        ranges.append((max(first, 0), min(last, len(lines))))
    (top, bottom), (left, right) = ranges
    return Box(top, left, bottom - top, right - left)


def _widened(box: Box, canvas: Canvas, height: int, width: int) -> Box:
    """The box with the aspect ratio of the canvas, as far as an image of ``height`` x ``width`` permits."""
    ratio = canvas.height / canvas.width
    high = min(max(box.height, round(box.width * ratio)), height)
    wide = min(max(box.width, round(box.height / ratio)), width)
    top, left = box.top - (high - box.height) // 2, box.left - (wide - box.width) // 2
    return Box(min(max(top, 0), height - high), min(max(left, 0), width - wide), high, wide)
