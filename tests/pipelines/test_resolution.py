from __future__ import annotations

import pytest
import torch

from impasto.errors import InputError
from impasto.pipelines.resolution import bins_for, nearest_bin, resize_and_crop


@pytest.mark.parametrize(("size", "count"), [(256, 33), (512, 33), (1024, 33), (2048, 40), (2880, 40)])
def test_bins_cover_about_the_area_of_the_square(size: int, count: int) -> None:
    bins = bins_for(size)
    assert bins is not None
    assert len(bins) == count
    assert bins[1.0] == (size, size)
    assert list(bins) == sorted(bins)
    for ratio, (height, width) in bins.items():
        assert abs(ratio - height / width) <= 0.005
        unit = 64 if size == 2880 else size // 16
        assert height % unit == width % unit == 0
        assert 0.87 * size**2 <= height * width <= size**2 * 1.03


@pytest.mark.parametrize("size", [0, 64, 128, 768, 4096])
def test_other_sizes_have_no_bins(size: int) -> None:
    assert bins_for(size) is None


def test_nearest_bin_goes_by_aspect_ratio_alone() -> None:
    bins = bins_for(512)
    assert bins is not None
    assert nearest_bin(512, 512, bins) == (512, 512)
    assert nearest_bin(64, 64, bins) == (512, 512)
    assert nearest_bin(1080, 1920, bins) == (384, 672)
    assert nearest_bin(10, 10000, bins) == (256, 1024)
    assert nearest_bin(10000, 10, bins) == (1024, 256)


@pytest.mark.parametrize(("height", "width"), [(0, 8), (8, 0), (-8, 8)])
def test_nearest_bin_refuses_sizes_that_are_none(height: int, width: int) -> None:
    with pytest.raises(InputError, match="must be a whole number from 1"):
        nearest_bin(height, width, {1.0: (8, 8)})


def test_resize_and_crop_keeps_the_centre_and_the_shape() -> None:
    images = torch.zeros(1, 1, 8, 32)
    images[..., 12:20] = 1  # the middle quarter
    square = resize_and_crop(images, 16, 16)
    assert square.shape == (1, 1, 16, 16)
    assert square.min() > 0.7  # nothing but the middle, softened at its border
    assert resize_and_crop(images, 8, 32) is images


def test_resize_and_crop_always_gives_the_size_asked_for() -> None:
    assert int(56 * (488 / 56)) == 487  # rounding: truncation alone would cover one pixel too few
    for old in range(5, 60, 3):
        for new in range(5, 60):
            assert resize_and_crop(torch.ones(1, 1, old, old), new, new).shape[2:] == (new, new)
    assert resize_and_crop(torch.ones(1, 1, 56, 56), 488, 488).shape[2:] == (488, 488)
