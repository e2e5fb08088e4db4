from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from impasto.errors import InputError, OutputError
from impasto.pipelines import image_files
from impasto.pipelines.image_files import GenerationSettings, check_image_path, read_settings, save_image
from impasto.pipelines.images import ImageProcessor

SETTINGS = GenerationSettings(
    prompt="a red cube on top of a blue sphere",
    negative_prompt="blurry",
    steps=20,
    sampler="DPMSolverMultistep",
    guidance_scale=4.5,
    seed=1,
    height=128,
    width=96,
    model="builtin:scenes",
)


def sample_image(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


# --- tensors <-> images ---


def test_postprocess_gives_every_kind_of_output() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    processor = ImageProcessor()
    expected = np.array([[0, 0], [0.5, 1]])
    assert processor.postprocess(images, output_type="latent") is images
    assert np.array_equal(processor.postprocess(images, output_type="pt")[0, 2], expected)
    assert np.array_equal(processor.postprocess(images, output_type="np")[0, :, :, 1], expected)
    (result,) = processor.postprocess(images)
    assert np.asarray(result)[..., 0].tolist() == [[0, 0], [128, 255]]


def test_postprocess_denormalizes_the_images_it_is_told_to() -> None:
    images = torch.full((2, 3, 4, 4), 0.5)
    result = ImageProcessor().postprocess(images, output_type="pt", do_denormalize=[True, False])
    assert result[0].unique().item() == 0.75
    assert result[1].unique().item() == 0.5


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (torch.zeros(1, 3, 4, 4), {"output_type": "jpeg"}, "output_type must be one of pil, np, pt, latent"),
        (np.zeros((1, 4, 4, 3)), {}, "not a ndarray"),
        (torch.zeros(3, 4, 4), {}, r"not \(3, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4), {"do_denormalize": [True]}, "1 entries for 2 images"),
    ],
)
def test_postprocess_refuses(image: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ImageProcessor().postprocess(image, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nan_is_announced_and_black(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    images = torch.ones(3, 3, 4, 4, dtype=dtype)
    images[1, 0, 0, 0] = float("nan")
    images[2, :, 1, 1] = float("inf")
    with caplog.at_level(logging.WARNING, logger="impasto"):
        pil_images = ImageProcessor().postprocess(images)
    assert "images 1, 2 (of 3) hold NaN" in caplog.text
    assert np.asarray(pil_images[1])[0, 0].tolist() == [0, 255, 255]
    assert np.asarray(pil_images[2]).min() == 255
    assert torch.as_tensor(ImageProcessor().postprocess(images, "pt")[1]).isnan().sum() == 1


def test_finite_images_are_not_announced(caplog: pytest.LogCaptureFixture) -> None:
    ImageProcessor().postprocess(torch.zeros(1, 3, 4, 4))
    assert not caplog.text


def test_numpy_to_pil_does_not_wrap_around(caplog: pytest.LogCaptureFixture) -> None:
    levels = np.array([-0.5, 0.0, 1.5, np.nan], dtype=np.float32).reshape(1, 2, 2, 1)
    (result,) = ImageProcessor.numpy_to_pil(levels)
    assert result.mode == "L"
    assert np.asarray(result).tolist() == [[0, 0], [255, 0]]
    assert "NaN" in caplog.text


def test_preprocess_inverts_postprocess() -> None:
    processor = ImageProcessor(vae_scale_factor=8)
    source = sample_image()
    encoded = processor.preprocess([source, source])
    assert encoded.shape == (2, 3, 16, 24)
    assert encoded.min() >= -1
    assert encoded.max() <= 1
    for result in processor.postprocess(encoded):
        assert np.array_equal(np.asarray(result), np.asarray(source))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_preprocess_makes_images_rgb(mode: str) -> None:
    assert ImageProcessor().preprocess(sample_image(mode)).shape == (1, 3, 16, 24)


def test_preprocess_cuts_sizes_down_to_whole_latents() -> None:
    processor = ImageProcessor(vae_scale_factor=8)
    assert processor.preprocess(sample_image(size=(31, 17))).shape == (1, 3, 16, 24)
    assert processor.preprocess(sample_image(size=(31, 17)), height=47, width=9).shape == (1, 3, 40, 8)
    assert processor.preprocess(np.zeros((17, 31, 3), np.float32)).shape == (1, 3, 16, 24)
    with pytest.raises(InputError, match="smaller than a latent of 8"):
        processor.preprocess(sample_image(size=(7, 7)))


def test_preprocess_takes_integers_as_levels() -> None:
    levels = np.array(sample_image())
    expected = ImageProcessor().preprocess(sample_image())
    assert torch.equal(ImageProcessor().preprocess(levels), expected)
    assert torch.equal(ImageProcessor().preprocess(torch.from_numpy(levels).permute(2, 0, 1)), expected)


def test_preprocess_leaves_latents_alone() -> None:
    latents = torch.randn(2, 4, 3, 5)
    assert torch.equal(ImageProcessor().preprocess(latents), latents)
    with pytest.raises(InputError, match="smaller than a latent"):
        ImageProcessor(vae_latent_channels=16).preprocess(latents)


def test_preprocess_takes_negative_values_as_normalized_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    images = torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8)
    assert torch.equal(ImageProcessor().preprocess(images), images)
    assert "[-1, 1]" in caplog.text


@pytest.mark.parametrize(
    "images",
    [
        [],
        "cat.png",
        [None],
        [sample_image(), torch.zeros(3, 8, 8)],
        torch.zeros(8),
        [np.zeros((8, 8)), np.zeros((8, 9))],
    ],
)
def test_preprocess_refuses_what_is_not_a_batch_of_images(images: Any) -> None:
    with pytest.raises(InputError):
        ImageProcessor().preprocess(images)


def test_config_has_the_scale_factor() -> None:
    assert ImageProcessor(vae_scale_factor=4).config.vae_scale_factor == 4


# --- settings -----------------------------------------------------------------------------------------------------


def test_settings_read_like_those_of_other_tools() -> None:
    assert SETTINGS.to_text() == (
        "a red cube on top of a blue sphere\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: DPMSolverMultistep, CFG scale: 4.5, Seed: 1, Size: 96x128, "
        'Model: "builtin:scenes"'
    )


PROMPTS = [
    "",
    "a cat, a dog, and: a \"bird\" 'x' \\ back",
    "two\nlines\n",
    "\n\n leading and trailing  \n",
    "Steps: 3, Sampler: none\nSteps: 5",
    "Negative prompt: not one",
    "a\nNegative prompt: b\nNegative prompt: c",
    "Negative prompt from line: 7",
    "漢字 😀 é\r\nx\x85y\u2028z\ttab",
]


@pytest.mark.parametrize("negative", PROMPTS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_settings_survive_as_text(prompt: str, negative: str) -> None:
    settings = GenerationSettings(
        prompt=prompt,
        negative_prompt=negative,
        steps=4,
        guidance_scale=1 / 3,
        seed=2**63 + 1,
        model='C:\\models, "mine"\nnew',
        extra={"Dtype": "bfloat16", "Note": " a, b: c ", "Empty": ""},
    )
    assert GenerationSettings.from_text(settings.to_text()) == settings


def test_settings_without_optional_values() -> None:
    settings = GenerationSettings(prompt="a cat", steps=1)
    assert settings.to_text() == "a cat\nSteps: 1"
    assert GenerationSettings.from_text(settings.to_text()) == settings


@pytest.mark.parametrize("name", ["", " a", "a:b", "a, b", 'a"b', "a\nb", "Seed"])
def test_names_of_extra_settings_that_could_not_be_read_back(name: str) -> None:
    with pytest.raises(InputError, match="cannot name an extra setting"):
        GenerationSettings(prompt="a cat", steps=1, extra={name: "x"})


def test_settings_of_another_tool_are_understood() -> None:
    text = "a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x768, Model hash: 81761151ea\n"
    settings = GenerationSettings.from_text(text)
    assert (settings.sampler, settings.guidance_scale, settings.width, settings.height) == ("Euler a", 7, 512, 768)
    assert settings.extra == {"Model hash": "81761151ea"}


@pytest.mark.parametrize("text", ["", "a cat", "a cat\nSteps: many", "a cat\nSeed: 1", "a\nSteps: 1, Size: axb"])
def test_text_without_settings_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="holds no settings"):
        GenerationSettings.from_text(text)


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [SETTINGS.prompt, "two\nlines, 漢字 😀"])
@pytest.mark.parametrize("extension", ["png", "PNG", "jpg", "jpeg", "webp"])
def test_images_carry_their_settings(tmp_path: Path, extension: str, prompt: str) -> None:
    settings = GenerationSettings(prompt=prompt, steps=20, seed=7)
    path = tmp_path / f"image.{extension}"
    source = Image.linear_gradient("L").resize((24, 16)).convert("RGB")
    save_image(source, path, settings)
    assert read_settings(path) == settings
    assert os.listdir(tmp_path) == [path.name]
    with Image.open(path) as stored:
        assert stored.size == (24, 16)
        if extension.lower() == "png":
            assert stored.info["parameters"] == settings.to_text()
            assert np.array_equal(np.asarray(stored), np.asarray(source))
        else:
            assert abs(np.asarray(stored, dtype=float) - np.asarray(source)).mean() < 2


def test_settings_that_a_jpeg_has_no_room_for_do_not_cost_the_image(tmp_path: Path) -> None:
    long = GenerationSettings(prompt="a " * 10_000, negative_prompt="b " * 8_000, steps=1)
    for extension in ("png", "jpg", "webp"):
        save_image(sample_image(), tmp_path / f"a.{extension}", long)
        if extension != "jpg":
            assert read_settings(tmp_path / f"a.{extension}") == long
    with pytest.raises(InputError, match="no generation settings"):
        read_settings(tmp_path / "a.jpg")
    short = GenerationSettings(prompt="a" * 32_000, steps=1)
    save_image(sample_image(), tmp_path / "a.jpg", short)
    assert read_settings(tmp_path / "a.jpg") == short


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_images_of_other_modes_are_written(tmp_path: Path, extension: str, mode: str) -> None:
    path = tmp_path / f"image.{extension}"
    save_image(sample_image(mode), path)
    with Image.open(path) as stored:
        assert stored.size == (24, 16)
        assert stored.mode == ("RGB" if extension == "jpg" and mode != "L" else stored.mode)


def test_undecodable_characters_do_not_cost_the_image(tmp_path: Path) -> None:
    save_image(sample_image(), tmp_path / "a.png", GenerationSettings(prompt="caf\udce9", steps=1))
    assert read_settings(tmp_path / "a.png").prompt == "caf?"


def test_new_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_image(sample_image(), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_old_image_is_replaced(tmp_path: Path) -> None:
    save_image(sample_image(), tmp_path / "a.png", GenerationSettings(prompt="old", steps=1))
    save_image(sample_image(), tmp_path / "a.png", GenerationSettings(prompt="new", steps=1))
    assert read_settings(tmp_path / "a.png").prompt == "new"
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("step", ["write", "replace"])
def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fails(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_files.os, "fsync" if step == "write" else "replace", fails)
    with pytest.raises(OutputError, match="No space left"):
        save_image(sample_image(), path)
    assert os.listdir(tmp_path) == ["a.png"]
    assert path.read_bytes() == b"old"


def test_an_interruption_leaves_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(image_files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_image(sample_image(), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.tiff", "extension"),
        ("a", "extension"),
        ("none/a.png", "does not exist"),
        ("folder.png", "is a folder"),
        ("file/a.png", "does not exist"),
    ],
)
def test_paths_that_cannot_be_written(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=message):
        check_image_path(tmp_path / name)
    with pytest.raises(OutputError, match=message):
        save_image(sample_image(), tmp_path / name)


def test_an_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files.os, "access", lambda *args: False)  # root may write everywhere
    with pytest.raises(OutputError, match="not writable"):
        save_image(sample_image(), tmp_path / "a.png")


def test_an_image_too_large_for_its_format(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"try \.png"):
        save_image(Image.new("RGB", (17000, 1)), tmp_path / "a.webp")
    assert os.listdir(tmp_path) == []


def test_files_without_settings_are_refused(tmp_path: Path) -> None:
    save_image(sample_image(), tmp_path / "a.png")
    with pytest.raises(InputError, match="holds no generation settings"):
        read_settings(tmp_path / "a.png")
    with pytest.raises(InputError, match="No such file"):
        read_settings(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(InputError, match="cannot be read as an image"):
        read_settings(tmp_path / "c.png")
