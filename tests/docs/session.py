"""A folder in which the examples of a page run, in order, as a reader would run them."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
from PIL import Image
from typer.testing import CliRunner

import impasto
from impasto import cli
from impasto.pipelines.glm_image import GlmImagePipeline
from impasto.pipelines.pixart import PixArtPipeline
from impasto.pipelines.pixart_edits import PixArtImg2ImgPipeline, PixArtInpaintPipeline

from ..tiny import write_pipeline
from ..tiny_glm import pipelines, prior_parts

STEPS = 2  # at most


def write_sigma(folder: Path) -> Path:
    """A small pipeline in place of a published one."""
    return write_pipeline(folder / "sigma")


def write_glm(folder: Path) -> Path:
    """A small GLM-Image."""
    pipe, _ = pipelines()
    for name, component in prior_parts().items():
        setattr(pipe, name, component)
    pipe.save_pretrained(folder / "glm")
    return folder / "glm"


def write_adapter(path: Path) -> None:
    """An adapter of the bundled model, of its transformer and text encoder."""
    pipe = impasto.PixArtSigmaPipeline.from_pretrained("builtin:scenes")
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    text = peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
    impasto.transforms.adapters.add(pipe.text_encoder, text, "default")
    pipe.save_adapter(path.parent, weight_name=path.name)


def write_images(folder: Path) -> None:
    """The images that examples name."""
    for name in ("lighthouse.jpg", "harbour.jpg", "sign.png"):
        Image.new("RGB", (256, 256), "teal").save(folder / name)
    mask = Image.new("L", (256, 256), 0)
    mask.paste(255, (64, 64, 192, 192))
    mask.save(folder / "mask.png")


class Session:
    """Runs code with few steps, and published models replaced by small ones."""

    def __init__(self, replacements: Mapping[str, str], monkeypatch: pytest.MonkeyPatch):
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.replacements = replacements
        for cls in (PixArtPipeline, PixArtImg2ImgPipeline, PixArtInpaintPipeline, GlmImagePipeline):
            monkeypatch.setattr(cls, "__call__", few_steps(cls.__call__))

    def replaced(self, text: str) -> str:
        for name, other in self.replacements.items():
            text = text.replace(name, other)
        return text

    def python(self, text: str) -> None:
        """Run code with the names of the earlier code."""
        exec(compile(self.replaced(text), "example", "exec"), self.names)

    def impasto(self, arguments: list[str]) -> None:
        """Run a command."""
        arguments = [self.replaced(each) for each in arguments]
        if arguments[0] in ("generate", "batch"):
            arguments += ["--steps", str(STEPS), "--device", "cpu"]  # the last one of an option holds
        if arguments[0] == "train":
            arguments += ["--set", f"steps={STEPS}", "--set", "schedule.warmup=1"]
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, result.stderr


def few_steps(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call with fewer steps."""

    @functools.wraps(call)
    def shorter(*arguments: Any, **options: Any) -> Any:
        if "timesteps" not in options:
            options["num_inference_steps"] = STEPS
        return call(*arguments, **options)

    return shorter


def copy_written(folder: Path, into: Path) -> None:
    """The files of a prepared folder, for one page."""
    shutil.copytree(folder, into, dirs_exist_ok=True)
