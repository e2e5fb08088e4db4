"""The scripts under ``examples/``, run on a small model."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from impasto.errors import MissingDependencyError, ResourceError
from impasto.pipelines.pixart import PixArtAlphaPipeline, PixArtSigmaPipeline

from .tiny import tiny_text_encoder, tiny_transformer, tiny_vae, write_pipeline

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_text_encoder(d_model=64).config
    config.d_kv = 16  # 4 bits on the CPU want multiples of 64 on all sides
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = type(tiny_text_encoder())(config).eval()
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    transformer = tiny_transformer(seed=1, caption_channels=64)
    folder = tmp_path_factory.mktemp("model") / "sigma"
    return write_pipeline(folder, text_encoder=encoder, transformer=transformer)


def load(name: str) -> dict[str, Any]:
    """The names of a script; what follows ``if __name__`` is not run."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def draw(name: str, model: Path, output: Path, *arguments: str) -> torch.Tensor:
    """Run a script and read its picture, [H, W, 3] from 0 to 1."""
    main: Callable[[list[str]], None] = load(name)["main"]
    main(["--model", str(model), "--steps", "2", "--output", str(output), *arguments])
    with Image.open(output) as image:
        return torch.from_numpy(np.asarray(image).copy()).float() / 255


def expected(model: Path, **options: Any) -> torch.Tensor:
    pipe = PixArtSigmaPipeline.from_pretrained(model, **options)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe("cute cat", num_inference_steps=2, generator=generator, output_type="np").images
    return torch.from_numpy(images)[0].float()


def test_under_8_gb_with_full_precision_is_the_pipeline(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    found = draw("under_8gb", model, tmp_path / "x.png", "--bits", "16")
    assert (found - expected(model)).abs().max() < 0.01


@pytest.mark.parametrize("library", ["bitsandbytes", "torchao"])
def test_under_8_gb(library: str, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip(library)
    found = draw("under_8gb", model, tmp_path / "x.png", "--library", library)
    error = (found - expected(model)).abs()
    assert 0 < error.max() < 0.2
    assert error.mean() < 0.02


def test_under_7_gb(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("bitsandbytes")
    found = draw("under_7gb", model, tmp_path / "x.png")
    error = (found - expected(model)).abs()
    assert error.max() > 0.005
    assert error.mean() < 0.1


def test_alpha_is_drawn_by_its_own_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    folder = write_pipeline(tmp_path / "alpha", PixArtAlphaPipeline, vae=tiny_vae(scaling_factor=0.18215))
    monkeypatch.setattr(PixArtSigmaPipeline, "__init__", None)
    assert draw("under_8gb", folder, tmp_path / "x.png", "--bits", "16").shape == (16, 16, 3)


@pytest.mark.parametrize(("script", "library"), [("under_8gb", "bitsandbytes"), ("under_7gb", "bitsandbytes")])
def test_a_missing_library(script: str, library: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingDependencyError, match=f"pip install -U accelerate {library}"):
        load(script)["main"](["--model", str(model)])


def test_memory_budget(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "prompts"
    arguments = ("--budget", "3GB", "--prompt-cache", str(cache))
    first = draw("memory_budget", model, tmp_path / "x.png", *arguments)
    assert "3.00 GB on" in capsys.readouterr().out
    assert len(list(cache.glob("*.safetensors"))) == 2  # the prompt and the empty one
    assert torch.equal(draw("memory_budget", model, tmp_path / "y.png", *arguments), first)
    assert (first - expected(model)).abs().max() < 0.1  # of lower precision, where the machine has it
    with pytest.raises(ResourceError, match="the smallest that works is"):
        load("memory_budget")["main"](["--model", str(model), "--budget", "60MB"])
