"""Buckets: the sizes that images are trained at, and which image goes to which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...checks import finite, whole_number
from ...errors import ConfigurationError, InputError
from ...pipelines.resolution import bins_for

_BASES = (256, 512, 1024, 2048, 2880)
_MOST_SIDE = 16384

TOO_SMALL = "smaller than the bucket by more than max_upscale"
TOO_EXTREME = "an aspect ratio of which the bucket would cut off more than max_crop"
REASONS = ("", TOO_SMALL, TOO_EXTREME)


@dataclass(frozen=True)
class Buckets:
    """The (height, width) in pixels that images are resized and cropped to.

    Attributes:
        max_upscale: an image that would have to be enlarged by more than this factor is dropped.
        max_crop: an image that would lose more than this share of its area is dropped.
    """

    sizes: tuple[tuple[int, int], ...]
    max_upscale: float = 2.0
    max_crop: float = 0.5

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ConfigurationError("there are no buckets; give a base (256 to 2880) or a list of (height, width)")
        for height, width in self.sizes:
            whole_number("the height of a bucket", height, most=_MOST_SIDE, error=ConfigurationError)
            whole_number("the width of a bucket", width, most=_MOST_SIDE, error=ConfigurationError)
        if len(set(self.sizes)) < len(self.sizes):
            raise ConfigurationError(f"the buckets {list(self.sizes)} contain one size twice; remove it")
        finite("max_upscale", self.max_upscale, above=0, error=ConfigurationError)
        finite("max_crop", self.max_crop, 0, 1, error=ConfigurationError)

    @classmethod
    def of_base(cls, base: int, max_upscale: float = 2.0, max_crop: float = 0.5) -> Buckets:
        """The buckets of PixArt's multi-aspect training at ``base`` x ``base`` pixels: 256, 512, 1024, 2048 or 2880."""
        bins = bins_for(base) if base in _BASES else None
        if bins is None:
            raise ConfigurationError(f"there are buckets of the bases {', '.join(map(str, _BASES))}, not of {base}")
        return cls(tuple(dict.fromkeys(bins.values())), max_upscale, max_crop)

    def assign(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of each image: that of the nearest aspect ratio, by logarithm; of equals, the largest that fits.

        Args:
            sizes: [N, 2] heights and widths in pixels.

        Returns:
            The buckets' indices [N], -1 for dropped images, and the indices [N] of their ``REASONS``.
        """
        sizes = np.asarray(sizes, np.float64).reshape(-1, 2)
        bins = np.asarray(self.sizes, np.float64)  # [K, 2]
        chosen = np.full(len(sizes), -1, np.int64)
        reasons = np.zeros(len(sizes), np.int8)
        for start in range(0, len(sizes), 1 << 16):  # [N, K] in chunks
            part = sizes[start : start + (1 << 16)]
            scales = (bins[None] / part[:, None]).max(-1)  # [n, K] until the image covers the bucket
            ratios = np.log(part[:, 0] / part[:, 1])[:, None] - np.log(bins[:, 0] / bins[:, 1])[None]
            distance = np.abs(ratios).round(9)
            # Of buckets of one aspect ratio, the largest that needs no enlargement, else the smallest.
            area = bins.prod(-1)[None]
            preference = np.where(scales <= 1, -area, area)
            best = np.lexsort((preference, scales > 1, distance), axis=-1)[:, 0]
            rows = np.arange(len(part))
            scale = scales[rows, best]
            kept = bins[best].prod(-1) / (part * scale[:, None]).prod(-1)
            fault = np.where(scale > self.max_upscale + 1e-9, 1, np.where(1 - kept > self.max_crop + 1e-9, 2, 0))
            chosen[start : start + len(part)] = np.where(fault == 0, best, -1)
            reasons[start : start + len(part)] = fault
        return chosen, reasons


def cover(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image of ``size``, scaled until it just covers ``target``."""
    if min(size) < 1:
        raise InputError(f"an image of {size[0]} x {size[1]} pixels is empty")
    scale = max(target[0] / size[0], target[1] / size[1])
    return max(round(size[0] * scale), target[0]), max(round(size[1] * scale), target[1])


def sizes_of(sizes: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    """Custom buckets from lists [height, width], as a configuration has them.

    Raises:
        ConfigurationError: not pairs.
    """
    if any(len(pair) != 2 for pair in sizes):
        raise ConfigurationError(f"buckets are pairs [height, width], not {list(sizes)}")
    return tuple((pair[0], pair[1]) for pair in sizes)
