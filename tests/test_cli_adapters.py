"""The command line with adapters: ``impasto generate --lora`` and ``impasto info`` of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.tiny import write_pipeline
from tests.tiny_adapters import DIALECTS
from typer.testing import CliRunner, Result

from impasto import cli
from impasto.checkpoints.adapters.file import AdapterDefaults
from impasto.pipelines.image_files import read_settings
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.schedulers.lcm import LCMScheduler


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("model"))


def load(model: Path) -> Any:
    pipe = PixArtSigmaPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapter(model: Path, folder: Path, dialect: str) -> Path:
    pipe = load(model)
    written = DIALECTS[dialect]({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder})
    file = folder / f"{dialect}.safetensors"
    save_file({name: x.contiguous() for name, x in written.tensors.items()}, file, written.header)
    return file


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def generate(model: Path, *arguments: Any) -> Result:
    options = ("--model", model, "--device", "cpu", "--dtype", "float32", "--seed", 3)
    return call("generate", "a red cube", *options, *arguments)


def test_images_with_adapters_are_those_of_the_pipeline(model: Path, tmp_path: Path) -> None:
    first, second = adapter(model, tmp_path, "onetrainer_comfy"), adapter(model, tmp_path, "lycoris_lokr")
    path = tmp_path / "x.png"
    result = generate(model, "--lora", first, "--lora", f"{second}:0.5", "--steps", 2, "--output", path)
    assert result.exit_code == 0, result.output
    pipe = load(model)
    pipe.load_lora_weights(first, adapter_name="a")
    pipe.load_lora_weights(second, adapter_name="b")
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    expected = pipe("a red cube", num_inference_steps=2, generator=torch.Generator().manual_seed(3)).images[0]
    with Image.open(path) as image:
        assert abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    assert read_settings(path).extra["Lora"] == "onetrainer_comfy 1; lycoris_lokr 0.5"


def test_an_adapter_for_few_steps_says_how_to_generate(model: Path, tmp_path: Path) -> None:
    pipe = load(model)
    pipe.load_lora_weights(adapter(model, tmp_path, "diffusers"))
    few = pipe.save_adapter(tmp_path / "few", defaults=AdapterDefaults("lcm", 4, 1.0))
    result = generate(model, "--lora", few, "--output", tmp_path / "x.png")
    assert result.exit_code == 0, result.output
    settings = read_settings(tmp_path / "x.png")
    assert (settings.steps, settings.guidance_scale, settings.sampler) == (4, 1.0, "lcm")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0}
    expected = pipe("a red cube", generator=torch.Generator().manual_seed(3), **options).images[0]
    with Image.open(tmp_path / "x.png") as image:
        assert abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    generate(model, "--lora", few, "--steps", 2, "--scheduler", "ddim", "--output", tmp_path / "y.png")
    settings = read_settings(tmp_path / "y.png")
    assert (settings.steps, settings.guidance_scale, settings.sampler) == (2, 1.0, "ddim")


def test_evaluate_takes_frames_adapters_and_their_words(model: Path, tmp_path: Path) -> None:
    pipe = load(model)
    pipe.load_lora_weights(adapter(model, tmp_path, "diffusers"))
    few = pipe.save_adapter(tmp_path / "few", defaults=AdapterDefaults("lcm", 2, 1.0))
    path, options = tmp_path / "report.json", ["--height", 16, "--width", 24, "--lora", few, "--adapter-words"]
    result = call("evaluate", "--model", model, "--n", 2, *options, "--output", path)
    assert result.exit_code == 0, result.output
    assert "2 images: 2 new words." in result.stdout
    assert "sharpness" in result.stdout
    settings = json.loads(path.read_text())["settings"]
    assert [settings[name] for name in ("height", "width", "scheduler", "num_inference_steps")] == [16, 24, "lcm", 2]
    assert call("evaluate", "--model", model, "--height", 0).exit_code == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nothing.safetensors", "no adapter 'nothing.safetensors': it is no file, no folder, and no hub id"),
        ("somewhere/nothing.safetensors", "Give one of these, or builtin:scenes-lcm."),
        ("~/nothing", "no adapter '~/nothing'"),
        ("builtin:x", "no bundled adapter 'builtin:x'"),
        ("builtin:scenes-lcm:abc", "the weight of 'builtin:scenes-lcm' must be a number, not 'abc'"),
        ("{strange}:abc", "flux.safetensors' must be a number, not 'abc'"),
        ("{strange}", "does not fit"),
        ("{strange}:nan", "finite"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_an_error(model: Path, given: str, words: str, tmp_path: Path) -> None:
    tensors = {f"transformer.blocks_of_flux.0.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(tensors, tmp_path / "flux.safetensors")
    lora = given.replace("{strange}", str(tmp_path / "flux.safetensors"))
    result = generate(model, "--lora", lora, "--output", tmp_path / "x.png")
    assert result.exit_code == 1
    assert words in result.stderr
    assert not (tmp_path / "x.png").exists()


def test_the_folder_of_a_training_run_has_its_adapter_in_the_result(model: Path, tmp_path: Path) -> None:
    pipe = load(model)
    pipe.load_lora_weights(adapter(model, tmp_path, "diffusers"))
    pipe.save_adapter(tmp_path / "run" / "result")
    (tmp_path / "run" / "checkpoints").mkdir()
    result = generate(model, "--lora", tmp_path / "run", "--steps", 1, "--output", tmp_path / "x.png")
    assert result.exit_code == 0, result.output
    assert read_settings(tmp_path / "x.png").extra["Lora"] == "run 1"


def test_info_describes_an_adapter(model: Path, tmp_path: Path) -> None:
    comfy = call("info", adapter(model, tmp_path, "onetrainer_comfy")).stdout
    for line in (
        "onetrainer_comfy.safetensors: an adapter, LoRA (23 layers)",
        "names as of: ComfyUI or OneTrainer (comfy), OneTrainer (comfy)",
        "for: transformer (21 layers), text_encoder (2 layers)",
        "rank: 2\n",
        "alpha: 3; from: .alpha in the file",
        "base: a transformer of width 24 and 2 blocks or more",
        "--lora",
    ):
        assert line in comfy
    scripts = call("info", adapter(model, tmp_path, "scripts")).stdout
    assert "alpha: 8; from: the default of the original PixArt scripts, 8" in scripts
    lokr = call("info", adapter(model, tmp_path, "lycoris_lokr")).stdout
    assert "LoKr (20 layers)" in lokr
    assert "rank: 2 (10), whole matrices (10)" in lokr
    assert "DoRA (26 layers)" in call("info", adapter(model, tmp_path, "dora_rows")).stdout
