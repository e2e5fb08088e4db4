from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import (
    ASPECT_RATIO_256_BIN,
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
)
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from PIL import Image

from impasto.pipelines.images import ImageProcessor
from impasto.pipelines.resolution import bins_for, nearest_bin, resize_and_crop

BINS = {
    256: ASPECT_RATIO_256_BIN,
    512: ASPECT_RATIO_512_BIN,
    1024: ASPECT_RATIO_1024_BIN,
    2048: ASPECT_RATIO_2048_BIN,
}


@pytest.mark.parametrize("size", BINS)
def test_bins(size: int) -> None:
    expected = {float(ratio): tuple(map(int, sides)) for ratio, sides in BINS[size].items()}
    bins = bins_for(size)
    assert bins is not None
    assert list(bins.items()) == list(expected.items())


@pytest.mark.parametrize("size", BINS)
def test_nearest_bin(size: int) -> None:
    bins = bins_for(size)
    assert bins is not None
    rng = np.random.default_rng(size)
    for height, width in rng.integers(8, 4096, (2000, 2)).tolist():
        expected = PixArtImageProcessor.classify_height_width_bin(height, width, BINS[size])
        assert nearest_bin(height, width, bins) == expected
        assert ImageProcessor.classify_height_width_bin(height, width, BINS[size]) == expected


@pytest.mark.parametrize("old", [(8, 8), (12, 20), (21, 9)])
@pytest.mark.parametrize("new", [(8, 8), (16, 24), (5, 31), (40, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resize_and_crop(old: tuple[int, int], new: tuple[int, int], dtype: torch.dtype) -> None:
    images = torch.randn(2, 3, *old).to(dtype)
    expected = PixArtImageProcessor.resize_and_crop_tensor(images, new[1], new[0])
    assert torch.equal(resize_and_crop(images, *new), expected)
    assert torch.equal(ImageProcessor.resize_and_crop_tensor(images, new[1], new[0]), expected)


def test_resize_and_crop_where_the_reference_loses_the_picture() -> None:
    """56 * (488 / 56) rounds to just below 488; the reference then cuts out a single pixel."""
    images = torch.randn(1, 1, 56, 56)
    assert PixArtImageProcessor.resize_and_crop_tensor(images, 488, 488).shape[2:] == (1, 1)
    assert resize_and_crop(images, 488, 488).shape[2:] == (488, 488)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("do_denormalize", [None, [True, False]])
@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_postprocess(channels: int, dtype: torch.dtype, do_denormalize: Any, output_type: str) -> None:
    images = (torch.randn(2, channels, 6, 10) * 0.7).to(dtype)
    if do_denormalize:
        images[1] = images[1].clamp(0, 1)
    ours = ImageProcessor().postprocess(images, output_type, do_denormalize)
    theirs = PixArtImageProcessor().postprocess(images, output_type, do_denormalize)
    if output_type == "pil":
        assert [(x.mode, x.tobytes()) for x in ours] == [(x.mode, x.tobytes()) for x in theirs]
    else:
        assert type(ours) is type(theirs)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(torch.as_tensor(ours).float(), torch.as_tensor(theirs).float())


def pictures(kind: str) -> Any:
    levels = np.random.default_rng(0).integers(0, 256, (2, 17, 30, 3), dtype=np.uint8)
    floats = levels.astype(np.float32) / 255
    return {
        "pil": Image.fromarray(levels[0]),
        "pil_list": [Image.fromarray(x) for x in levels],
        "np": floats[0],
        "np_grey": floats[0, :, :, 0],
        "np_batch": floats,
        "np_list": list(floats),
        "pt": torch.from_numpy(floats[0]).permute(2, 0, 1),
        "pt_batch": torch.from_numpy(floats).permute(0, 3, 1, 2),
        "pt_list": list(torch.from_numpy(floats).permute(0, 3, 1, 2)),
        "latents": torch.randn(2, 4, 5, 7),
    }[kind]


@pytest.mark.parametrize("size", [{}, {"height": 40, "width": 12}])
@pytest.mark.parametrize("scale", [4, 8])
@pytest.mark.parametrize(
    "kind",
    ["pil", "pil_list", "np", "np_grey", "np_batch", "np_list", "pt", "pt_batch", "pt_list", "latents"],
)
def test_preprocess(kind: str, scale: int, size: dict[str, int]) -> None:
    ours = ImageProcessor(vae_scale_factor=scale).preprocess(pictures(kind), **size)
    theirs = PixArtImageProcessor(vae_scale_factor=scale).preprocess(pictures(kind), **size)
    if kind == "latents":  # random ones: a second draw, but equally untouched
        assert ours.shape == theirs.shape == (2, 4, 5, 7)
    else:
        assert torch.equal(ours, theirs)
