"""Aspect-ratio bins, and the resizing and cropping from a bin to the requested size.

PixArt's multi-aspect training used one fixed size for each aspect ratio (height / width). An image is generated at the
nearest of these sizes and then brought to the requested one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor

from ..checks import shown, whole_number
from ..errors import InputError

_MOST = 1 << 20  # pixels of a side

#: Height and width of each bin at 2048 px, in units of 128 px.
_SIZES_2048 = (
    (8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23),
    (11, 22), (11, 21), (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17),
    (15, 16), (16, 16), (16, 15), (17, 15), (17, 14), (18, 14), (18, 13), (19, 13), (20, 12),
    (21, 12), (22, 11), (23, 11), (24, 10), (25, 10), (26, 9), (27, 9), (28, 9), (29, 8), (30, 8),
    (31, 8), (32, 8),
)  # fmt: skip

#: At 1024 px in units of 64 px, and at 512 and 256 px: the same but for seven elongated sizes, most of them portraits.
_SIZES_1024 = tuple(
    size for size in _SIZES_2048 if size not in {(8, 31), (8, 30), (26, 9), (28, 9), (29, 8), (30, 8), (31, 8)}
)

#: At 2880 px, the base of the 4K models, in units of 64 px.
_SIZES_2880 = (
    (22, 90), (22, 87), (22, 84), (22, 81), (25, 78), (25, 75), (25, 73), (28, 70), (28, 67), (30, 64),
    (30, 61), (30, 59), (33, 60), (33, 56), (36, 53), (36, 50), (39, 50), (39, 47), (42, 47), (42, 45),
    (45, 45), (45, 42), (47, 42), (47, 39), (50, 39), (50, 36), (53, 36), (56, 33), (60, 33), (61, 30),
    (64, 30), (67, 28), (70, 28), (73, 25), (75, 25), (78, 25), (81, 22), (84, 22), (87, 22), (90, 22),
)  # fmt: skip

_TABLES = {
    256: (16, _SIZES_1024),
    512: (32, _SIZES_1024),
    1024: (64, _SIZES_1024),
    2048: (128, _SIZES_2048),
    2880: (64, _SIZES_2880),
}

Bins = Mapping[float, tuple[int, int]]


@cache
def bins_for(sample_size_px: int) -> Bins | None:
    """The bins of a model that was trained at ``sample_size_px`` x ``sample_size_px`` pixels.

    Returns:
        A mapping of aspect ratio (height / width, to two digits) to (height, width) in pixels, in ascending
        order; None where no table exists for that size (there are 256, 512, 1024, 2048 and 2880).
    """
    if sample_size_px not in _TABLES:
        return None
    unit, sizes = _TABLES[sample_size_px]
    # Requests are matched against the rounded ratio, as in training.
    return MappingProxyType({round(h / w, 2): (h * unit, w * unit) for h, w in sizes})


def nearest_bin(height: int, width: int, bins: Mapping[float, tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of the bin whose aspect ratio is nearest to that of ``height`` x ``width``."""
    height, width = whole_number("height", height, most=_MOST), whole_number("width", width, most=_MOST)
    ratio = min(bins, key=lambda ratio: abs(float(ratio) - height / width))
    bin_height, bin_width = bins[ratio]
    return int(bin_height), int(bin_width)


def resize_and_crop(images: Tensor, height: int, width: int) -> Tensor:
    """Scale images [B, C, H, W] until they cover ``height`` x ``width``, then cut out the centre."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise InputError(f"images must be a floating-point tensor [B, C, H, W], not {shown(images)}")
    height, width = whole_number("height", height, most=_MOST), whole_number("width", width, most=_MOST)
    old_height, old_width = images.shape[-2:]
    if (old_height, old_width) == (height, width):
        return images
    scale = max(height / old_height, width / old_width)
    # The product of a size with its own exact ratio may round to just below the target, hence the maximum.
    covering = max(int(old_height * scale), height), max(int(old_width * scale), width)
    images = F.interpolate(images, size=covering, mode="bilinear", align_corners=False)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    return images[:, :, top : top + height, left : left + width]  # [B, C, height, width]
