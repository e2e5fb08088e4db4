"""The view of an image that a sample is: where it is cropped, whether it is mirrored, and the resizing itself."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...checks import flag, shown, whole_number
from ...errors import ConfigurationError
from .buckets import cover


class View(NamedTuple):
    """One of the views of an image."""

    number: int  # 0 if views are not counted
    y: float  # where the crop lies, from 0 (top, left) to 1 (bottom, right)
    x: float
    mirrored: bool


@dataclass(frozen=True)
class Views:
    """Which views of an image are trained on.

    Attributes:
        crop: "centre"; "random", another crop each time; or a number: that many fixed crops of each image, which
            unlike random ones can be cached.
        flip: whether half of the samples are mirrored.
    """

    crop: Literal["centre", "random"] | int = "centre"
    flip: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.crop, str):
            if self.crop not in ("centre", "random"):
                raise ConfigurationError(
                    f"crop must be 'centre', 'random' or a number of fixed crops, not {shown(self.crop)}"
                )
        else:
            whole_number("crop", self.crop, most=64, error=ConfigurationError)
        flag("flip", self.flip, error=ConfigurationError)

    @property
    def count(self) -> int | None:
        """How many views an image has; None if they are not counted, as crops are random."""
        if self.crop == "random":
            return None
        return (1 if self.crop == "centre" else int(self.crop)) * (2 if self.flip else 1)

    def choose(self, name: str, rng: np.random.Generator) -> View:
        """A view of the image of this name. It always draws three numbers."""
        y, x, which = rng.random(3)
        if self.count is not None:
            return self.view(name, int(which * self.count))
        return View(0, y, x, self.flip and which < 0.5)

    def view(self, name: str, number: int) -> View:
        """One of the counted views. Fixed crops depend on the image's name, not on its place in the data."""
        crop, mirrored = divmod(number, 2) if self.flip else (number, 0)
        if self.crop == "centre":
            return View(number, 0.5, 0.5, bool(mirrored))
        key = int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:8], "big")
        y, x = np.random.Generator(np.random.Philox(key=key, counter=[0, crop, 0, 0])).random(2)
        return View(number, y, x, bool(mirrored))


def fit(image: Image.Image, target: tuple[int, int], view: View) -> tuple[Tensor, tuple[int, int]]:
    """Resize an image until it covers ``target`` (height, width), and crop it.

    Returns:
        The levels [C, height, width], uint8, and the top and left of the crop in pixels of the resized image.
    """
    height, width = cover((image.height, image.width), target)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    top = min(int(view.y * (height - target[0] + 1)), height - target[0])
    left = min(int(view.x * (width - target[1] + 1)), width - target[1])
    image = image.crop((left, top, left + target[1], top + target[0]))
    if view.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    levels = np.asarray(image)
    levels = levels[..., None] if levels.ndim == 2 else levels
    return torch.from_numpy(levels.transpose(2, 0, 1).copy()), (top, left)


def to_signed(levels: Tensor) -> Tensor:
    """Levels from 0 to 255 to float32 in [-1, 1]."""
    return 2.0 * (levels.float() / 255) - 1.0
