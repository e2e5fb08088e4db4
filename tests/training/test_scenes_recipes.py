"""The recipes of the bundled model, each shortened to a few steps of a tiny model, one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from impasto.cli.train import _check_scenes, _scenes
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.training.launch import launch
from impasto.training.settings import recipe_files as recipes

from .runs import rows

SHORT = ["checkpoints.every=1000", "log_every=4"]


def run(name: str, folder: Path, *changes: str) -> Path:
    configuration = recipes.read(name, [*SHORT, *changes])
    assert launch(configuration, folder / name, False, {"scenes": _scenes}, {"scenes": _check_scenes}) is None
    return folder / name


def test_the_chain_of_the_bundled_model(tmp_path: Path) -> None:
    frames = "data.sources.0.options.frames=[[32, 32]]"
    vae = run(
        "scenes-autoencoder",
        tmp_path,
        "steps=40",
        "schedule.warmup=2",
        "ema=0.5",
        frames,
        "data.sources.0.options.crop=[16, 16]",
        "data.sources.0.options.count=64",
        "data.sizes=[[16, 16], [32, 32]]",
        "validation.count=2",
        "validation.source.options={count: 2, seed: 1, frames: [[32, 32]]}",
        "models.vae.config.block_out_channels=[8, 8, 8, 8]",
    )
    log = rows(vae)
    assert log[-1]["mse"] < 0.8 * log[0]["mse"]
    assert log[-1]["psnr"] > 8

    text = run(
        "scenes-text-encoder",
        tmp_path,
        "steps=36",
        "schedule.warmup=4",
        "ema=0.5",
        "data.batch_size=32",
        "data.sources.0.options.count=640",
        "validation.count=32",
        "models.text_encoder.config.num_layers=1",
    )
    log = rows(text)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert log[-1]["validation_right"] > 0.5

    first = run(
        "scenes-128",
        tmp_path,
        "steps=12",
        "schedule.warmup=2",
        "ema=0.5",
        "compile=false",
        frames,
        "data.sources.0.options.count=64",
        "data.sizes=[[32, 32]]",
        "data.batch_size=8",
        "data.workers=0",
        "objective.labels.block=0",
        "models.transformer.config.num_layers=1",
        "models.transformer.config.sample_size=4",
        f"models.text_encoder.start_from={text / 'result'}",
        f"models.vae.start_from={vae / 'result'}",
        "checks={scenes: {prompts: 2, height: 32, width: 32, num_inference_steps: 1}}",
        "samples=null",
    )
    log = rows(first)
    assert log[-1]["labels"] < log[0]["labels"]
    assert log[-1]["scenes background"] <= 1
    pipe = PixArtSigmaPipeline.from_pretrained(first / "result")
    assert pipe.transformer.config.sample_size == 4

    second = run(
        "scenes-256",
        tmp_path,
        "steps=2",
        "compile=false",
        "data.sources.0.options.frames=[[64, 64]]",
        "data.sources.0.options.count=64",
        "data.sizes=[[64, 64]]",
        "data.batch_size=4",
        "data.workers=0",
        "micro_batch=2",
        "objective.labels.block=0",
        f"models.pipeline={first / 'result'}",
        f"models.text_encoder.start_from={first / 'result'}",
        f"models.transformer.start_from={first / 'result'}",
        "models.transformer.config.sample_size=8",
        "checks={}",
    )
    transformer = PixArtTransformer2DModel.from_pretrained(second / "result", subfolder="transformer")
    assert (transformer.config.sample_size, transformer.config.interpolation_scale) == (8, 1)

    third = run(
        "scenes-multiaspect",
        tmp_path,
        "steps=2",
        "compile=false",
        "objective.labels.block=0",
        "data.sources.0.options.frames=[[32, 48], [48, 32]]",
        "data.sources.0.options.count=64",
        "data.sizes=[[32, 48], [48, 32]]",
        "data.batch_size=4",
        "data.workers=0",
        "micro_batch=2",
        f"models.pipeline={second / 'result'}",
        f"models.text_encoder.start_from={second / 'result'}",
        f"models.transformer.start_from={second / 'result'}",
        "checks={}",
    )
    assert (third / "result" / "model_index.json").exists()

    last = third
    for name, part in (("scenes-edges", "rollout"), ("scenes-details", "t0_250"), ("scenes-finish", "agreement")):
        last = run(
            name,
            tmp_path,
            "steps=3",
            "log_every=3",
            "data.sources.0.options.frames=[[32, 48], [48, 32]]",
            "data.sources.0.options.count=64",
            "data.sizes=[[32, 48], [48, 32]]",
            "data.batch_size=8",
            "data.workers=0",
            f"models.pipeline={last / 'result'}",
            f"models.transformer.start_from={last / 'result'}",
            "checks={}",
        )
        assert rows(last)[-1][part] > 0

    for name in ("scenes-lcm", "scenes-lora"):
        adapter = run(
            name,
            tmp_path,
            "steps=2",
            "data.batch_size=4",
            "data.workers=0",
            "data.sizes=[[32, 32]]",
            *(f"data.sources.{i}.options.frames=[[32, 32]]" for i in range(1 if name == "scenes-lcm" else 2)),
            "validation=null",
            "checkpoints.best=null",
            f"models.pipeline={last / 'result'}",
        )
        assert any(path.suffix == ".safetensors" for path in (adapter / "result").rglob("*")), name


@pytest.mark.gpu
def test_the_chain_on_a_gpu(tmp_path: Path) -> None:
    """Training takes a GPU that is there: all that an objective makes has to be on it."""
    test_the_chain_of_the_bundled_model(tmp_path)


def test_the_base_has_at_most_20_megabytes_in_float16() -> None:
    from transformers import T5Config, T5EncoderModel

    from impasto.models.autoencoder.model import AutoencoderKL

    transformer = PixArtTransformer2DModel(**recipes.read("scenes-128").models.transformer.config)
    vae = AutoencoderKL(**recipes.read("scenes-autoencoder").models.vae.config)
    text = T5EncoderModel(T5Config(vocab_size=112, **recipes.read("scenes-text-encoder").models.text_encoder.config))
    parameters = sum(p.numel() for model in (transformer, vae, text) for p in model.parameters())
    assert 2 * parameters <= 19.8e6
    assert transformer.config.num_attention_heads % 4 == 0
    stages = [recipes.read(f"scenes-{name}") for name in ("256", "multiaspect")]
    assert [stage.models.transformer.config.get("sample_size") for stage in stages] == [32, None]


@pytest.mark.parametrize("name", [name for name in recipes.recipes() if name.startswith("scenes-")])
def test_validation_and_training_have_other_scenes(name: str) -> None:
    configuration = recipes.read(name)
    seeds = {source.options["seed"] for source in configuration.data.sources}
    if configuration.validation is not None and configuration.validation.source is not None:
        assert configuration.validation.source.options["seed"] not in seeds
