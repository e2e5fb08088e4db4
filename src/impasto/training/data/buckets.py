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
        own = np.log(bins[:, 0] / bins[:, 1]).round(9)
        ratios = np.unique(own)
        nearest = np.searchsorted((ratios[1:] + ratios[:-1]) / 2, np.log(sizes[:, 0] / sizes[:, 1]))
        chosen = np.empty(len(sizes), np.int64)
        for number, ratio in enumerate(ratios):
            members = np.flatnonzero(own == ratio)
            members = members[np.argsort(bins[members].prod(1))]
            images = np.flatnonzero(nearest == number)
            fitting = (bins[members][None] <= sizes[images][:, None]).all(2).sum(1)
            chosen[images] = members[np.maximum(fitting - 1, 0)]
        scale = (bins[chosen] / sizes).max(1)
        kept = bins[chosen].prod(1) / (sizes * scale[:, None]).prod(1)
        reasons = np.where(scale > self.max_upscale + 1e-9, 1, np.where(1 - kept > self.max_crop + 1e-9, 2, 0))
        chosen[reasons > 0] = -1
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
