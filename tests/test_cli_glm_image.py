"""The command line with a GLM-Image: images, edits, components, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from impasto import GlmImagePipeline, cli
from impasto.cli import pipelines as cli_pipelines
from impasto.pipelines.image_files import read_settings

from .tiny_glm import pipelines, prior_parts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe, _ = pipelines()
    for name, component in prior_parts().items():
        setattr(pipe, name, component)
    path = tmp_path_factory.mktemp("glm") / "tiny"
    pipe.save_pretrained(path)
    return path


def generate(model: Path, *arguments: Any) -> Result:
    fixed = ["generate", "--model", model, "--device", "cpu", "--dtype", "float32", *arguments]
    return CliRunner().invoke(cli.app, [str(argument) for argument in fixed])


def test_an_image_and_an_edit_are_those_of_the_pipeline(model: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    options = ["--steps", 2, "--seed", 3, "--height", 64, "--width", 96]
    result = generate(model, 'a sign "open"', "--output", first, *options)
    assert result.exit_code == 0, result.stderr
    pipe = GlmImagePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    same: dict[str, Any] = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(3)}
    expected = pipe('a sign "open"', height=64, width=96, **same).images[0]
    assert np.array_equal(np.asarray(Image.open(first)), np.asarray(expected))
    settings = read_settings(first)
    assert settings is not None
    assert (settings.steps, settings.guidance_scale, settings.seed) == (2, 1.5, 3)  # its usual guidance

    result = generate(model, "at night", "--image", first, "--output", second, *options)
    assert result.exit_code == 0, result.stderr
    same["generator"] = torch.Generator().manual_seed(3)
    expected = pipe("at night", image=Image.open(first), height=64, width=96, **same).images[0]
    assert np.array_equal(np.asarray(Image.open(second)), np.asarray(expected))


def test_an_edit_has_the_size_that_is_asked_for(model: Path, tmp_path: Path) -> None:
    source, result = tmp_path / "a.png", tmp_path / "b.png"
    Image.new("RGB", (64, 64), "red").save(source)
    options = ["--height", 50, "--width", 70, "--steps", 1, "--memory-budget", "4GB", "--output", result]
    done = generate(model, "at night", "--image", source, *options)
    assert done.exit_code == 0, done.stderr
    assert Image.open(result).size == (70, 50)


def test_budgets_and_parts_are_told(model: Path, tmp_path: Path) -> None:
    result = generate(model, "a cube", "--memory-budget", "4GB", "--steps", 1, "--output", tmp_path / "a.png")
    assert result.exit_code == 0, result.stderr
    assert "vision_language_encoder" in result.stderr
    printed = CliRunner().invoke(cli.app, ["info", str(model)]).stdout
    assert "GlmImageForConditionalGeneration" in printed
    assert "images of 64 x 64 px; sides are multiples of 32" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "40"], "height must be multiples of 32, not 40; the nearest size is 32"),
        (["--scheduler", "ddim"], "--scheduler is for PixArt"),
        (["--image", "missing.png"], "'missing.png' cannot be read as an image"),
        (["--image", "a.png", "--strength", "0.5"], "--strength is for PixArt"),
        (["--image", "a.png", "--mask", "m.png"], "--mask is for PixArt"),
    ],
)
def test_a_mistake_costs_no_loading(
    model: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_pipelines, "load", lambda *_: pytest.fail("loaded"))
    result = generate(model, "a cube", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
