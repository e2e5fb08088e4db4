from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor, VaeImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import (
    ASPECT_RATIO_256_BIN,
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
)
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from PIL import Image

import impasto.image_processor
from impasto.errors import ConfigurationError, InputError
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


# --- options and the other methods ---

OPTIONS: dict[str, dict[str, Any]] = {
    "mask": {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True},
    "gray": {"do_convert_grayscale": True},
    "unit": {"do_normalize": False},
    "as it is": {"do_resize": False},
    "bilinear": {"resample": "bilinear"},
    "bicubic": {"resample": "bicubic", "reducing_gap": 2},
    "nearest": {"resample": "nearest", "do_convert_rgb": True},
}


def processors(**options: Any) -> tuple[Any, Any]:
    return impasto.image_processor.VaeImageProcessor(**options), VaeImageProcessor(**options)


def test_processors_take_the_same_options() -> None:
    for ours, theirs in (
        (impasto.image_processor.VaeImageProcessor, VaeImageProcessor),
        (impasto.image_processor.PixArtImageProcessor, PixArtImageProcessor),
    ):
        mine, other = ([(p.name, p.default) for p in inspect.signature(x).parameters.values()] for x in (ours, theirs))
        assert mine[: len(other)] == other
        expected = {name: value for name, value in theirs().config.items() if name[0] != "_"}
        assert {name: value for name, value in ours().config.items() if name[0] != "_"} == expected
        missing = {n for n in dir(theirs) if n[0] != "_"} - set(dir(ours))
        assert not {name for name in missing if name in vars(VaeImageProcessor) | vars(PixArtImageProcessor)}


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, Image.Image):
        return ours.mode == theirs.mode and ours.size == theirs.size and ours.tobytes() == theirs.tobytes()
    assert type(ours) is type(theirs)
    return ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["pil", "pil_list", "np_batch", "np_list", "pt", "pt_batch"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, kind: str) -> None:
    if name in ("mask", "gray") and kind == "pt":
        kind = "pt_list"  # one tensor of three dimensions is several gray images
    ours, theirs = processors(**OPTIONS[name])
    assert same(ours.preprocess(pictures(kind)), theirs.preprocess(pictures(kind)))
    images = torch.rand(2, 3, 8, 8)
    for output in ("pt", "np"):
        assert same(ours.postprocess(images, output), theirs.postprocess(images, output))


@pytest.mark.parametrize("shape", [(2, 16, 24), (1, 16, 24)])
def test_gray_images_without_channels(shape: tuple[int, ...]) -> None:
    ours, theirs = processors(do_convert_grayscale=True)
    levels = torch.rand(*shape)
    assert same(ours.preprocess(levels), theirs.preprocess(levels))
    for array in (levels.numpy(), levels[0, ..., None].numpy()):
        assert same(ours.preprocess(array), theirs.preprocess(array))


@pytest.mark.parametrize("mode", ["default", "fill", "crop"])
@pytest.mark.parametrize("size", [(30, 17), (17, 30), (24, 24)])
@pytest.mark.parametrize("new", [(16, 40), (40, 16), (24, 24), (9, 13)])
def test_resize(mode: str, size: tuple[int, int], new: tuple[int, int]) -> None:
    image = pictures("pil").resize(size)
    ours, theirs = processors()
    assert same(ours.resize(image, *new, mode), theirs.resize(image, *new, mode))
    assert same(ours.preprocess(image, *new, mode), theirs.preprocess(image, *new, mode))
    if mode == "default":
        for kind in ("np_batch", "pt_batch"):
            assert same(ours.resize(pictures(kind), *new), theirs.resize(pictures(kind), *new))
    else:
        with pytest.raises(InputError, match="resize_mode"):
            ours.resize(pictures("pt_batch"), *new, mode)


def test_crops() -> None:
    ours, theirs = processors()
    box = (3, 2, 27, 15)
    assert same(
        ours.preprocess(pictures("pil"), crops_coords=box), theirs.preprocess(pictures("pil"), crops_coords=box)
    )


@pytest.mark.parametrize("pad", [0, 3, 50])
def test_crop_region(pad: int) -> None:
    rng = np.random.default_rng(pad)
    ours, theirs = processors()
    for _ in range(200):
        width, height = rng.integers(8, 60, 2).tolist()
        levels = np.zeros((height, width), dtype=np.uint8)
        top, left = rng.integers(0, height), rng.integers(0, width)
        levels[top : top + rng.integers(1, height + 1), left : left + rng.integers(1, width + 1)] = 255
        mask, size = Image.fromarray(levels), rng.integers(8, 80, 2).tolist()
        assert ours.get_crop_region(mask, *size, pad=pad) == theirs.get_crop_region(mask, *size, pad=pad)
    with pytest.raises(InputError, match="black everywhere"):
        ours.get_crop_region(Image.new("L", (8, 8)), 8, 8)


def test_overlay() -> None:
    ours, theirs = processors()
    original, new = pictures("pil_list")
    mask = Image.fromarray(np.random.default_rng(1).integers(0, 256, (17, 30), dtype=np.uint8))
    assert same(ours.apply_overlay(mask, original, new), theirs.apply_overlay(mask, original, new))
    box = (4, 3, 20, 12)
    assert same(ours.apply_overlay(mask, original, new, box), theirs.apply_overlay(mask, original, new, box))
    black = ours.apply_overlay(Image.new("L", (30, 17)), original, new)
    assert black.tobytes() == original.tobytes()


def test_small_conversions() -> None:
    ours, theirs = processors()
    image, floats = pictures("pil"), torch.rand(2, 3, 4, 6)
    for mode in ("RGB", "L", "P", "CMYK"):
        assert same(ours.convert_to_rgb(image.convert(mode)), theirs.convert_to_rgb(image.convert(mode)))
    assert same(ours.convert_to_grayscale(image), theirs.convert_to_grayscale(image))
    assert same(ours.blur(image), theirs.blur(image))
    assert same(ours.blur(image, 2), theirs.blur(image, 2))
    for values in (floats, floats.numpy()):
        assert same(ours.normalize(values), theirs.normalize(values))
        assert same(ours.binarize(values), theirs.binarize(values.copy() if values is not floats else floats.clone()))
    assert same(ours.denormalize(floats * 3), theirs.denormalize(floats * 3))
    assert same(ours.pt_to_numpy(floats), theirs.pt_to_numpy(floats))
    for array in (ours.pt_to_numpy(floats), ours.pt_to_numpy(floats)[..., 0]):
        assert same(ours.numpy_to_pt(array), theirs.numpy_to_pt(array))
    assert same(ours.pil_to_numpy([image, image]), theirs.pil_to_numpy([image, image]))
    for given in (image, floats, ours.pt_to_numpy(floats)):
        for sides in ((), (21, None), (None, 35), (21, 35)):
            assert ours.get_default_height_width(given, *sides) == theirs.get_default_height_width(given, *sides)


def test_transparency_becomes_white() -> None:
    """The reference drops it, and shows the color that it hides."""
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    ours, theirs = processors()
    assert ours.convert_to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert theirs.convert_to_rgb(clear).getpixel((0, 0)) == (255, 0, 0)


def test_options_that_cannot_be_used() -> None:
    for options in ({"do_convert_rgb": True, "do_convert_grayscale": True}, {"resample": "sinc"}):
        with pytest.raises(ConfigurationError):
            ImageProcessor(**options)
    with pytest.raises(InputError, match="different sizes"):
        ImageProcessor(do_resize=False).preprocess([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16))])
    with pytest.raises(InputError, match="resize_mode"):
        ImageProcessor().resize(Image.new("RGB", (8, 8)), 8, 8, "cover")
