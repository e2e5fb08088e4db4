"""The checkpoint that comes with the package. How often its images are right is measured by `impasto evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from impasto.checkpoints.adapters.file import AdapterDefaults
from impasto.checkpoints.hub import resolve
from impasto.pipelines.adapters import ChosenAdapter, adapter_defaults
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.scenes.evaluate import held_out_prompts, judge_images
from impasto.scenes.judge import read
from impasto.scenes.reading import Reading
from impasto.scenes.source import ScenesSource
from impasto.scenes.world import ON_TOP
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler
from impasto.schedulers.lcm import LCMScheduler
from impasto.training.objectives.autoencoder import psnr
from impasto.training.settings import recipe_files as recipes
from impasto.transforms.adapters.loading import locate


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("builtin:scenes")


@pytest.fixture(scope="module")
def pipeline() -> PixArtSigmaPipeline:
    pipe = PixArtSigmaPipeline.from_pretrained("builtin:scenes")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_and_stored_in_float16(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    stored = PixArtSigmaPipeline.from_pretrained("builtin:scenes", dtype="auto")
    assert {stored.transformer.dtype, stored.vae.dtype} == {torch.float16}
    assert stored.text_encoder.dtype == torch.float16


def test_diffusers_generates_the_same(folder: Path, pipeline: PixArtSigmaPipeline) -> None:
    theirs = diffusers.PixArtSigmaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "output_type": "latent", "use_resolution_binning": False}
    # It ignores the arguments that are not its own.
    plain = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, refine_below=0, guide_above=-1)
    ours = PixArtSigmaPipeline.from_pipe(pipeline, scheduler=plain)
    found, expected = (
        pipe(["a red cube", "a small green cone behind a blue sphere"], generator=torch.Generator(), **options).images
        for pipe in (ours, theirs)
    )
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-4


@pytest.fixture(scope="module")
def images() -> Tensor:
    source = ScenesSource(6, 77, [(256, 256)])
    read = [source.read(index, (256, 256), np.random.default_rng(index)).image for index in range(6)]
    return torch.stack([image for image in read if image is not None])


@torch.no_grad()
def test_its_autoencoder_reconstructs_unseen_scenes(pipeline: PixArtSigmaPipeline, images: Tensor) -> None:
    vae = pipeline.vae
    recipe = recipes.read("scenes-autoencoder").models.vae.config
    assert {name: vae.config[name] for name in recipe} == recipe
    latents = torch.cat([vae.encode(image[None]).latent_dist.mode() for image in images])  # [B, 16, 32, 32]
    assert latents.shape == (6, 16, 32, 32)
    reconstructions = torch.cat([vae.decode(each[None]).sample for each in latents])
    assert psnr(images, reconstructions) >= 33
    scaled = (latents * vae.config["scaling_factor"]).transpose(0, 1).flatten(1)
    assert scaled.mean(1).abs().max() < 0.6  # of six images; the mean and the deviation of many are 0 and 1
    assert 0.3 < float(scaled.std(1).min()) <= float(scaled.std(1).max()) < 2


def of_transformer(stage: str) -> dict[str, object]:
    return dict(recipes.read(f"scenes-{stage}").models.transformer.config)


def test_its_text_encoder_and_its_transformer_are_those_of_the_recipes(folder: Path) -> None:
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    recipe = dict(recipes.read("scenes-text-encoder").models.text_encoder.config)
    del recipe["tie_word_embeddings"]  # transformers stores True for every encoder
    assert {name: config[name] for name in recipe} == recipe
    config = json.loads((folder / "transformer" / "config.json").read_text())
    recipe = {name: value for stage in ("128", "256") for name, value in of_transformer(stage).items()}
    assert {name: config[name] for name in recipe} == recipe
    assert config["num_attention_heads"] % 4 == 0


def shows_the_demo(reading: Reading) -> bool:
    solids = [(solid.color, solid.shape) for solid in reading.solids]
    return solids == [("red", "cube"), ("blue", "sphere")] and reading.relations == (ON_TOP,)


def test_it_generates_a_red_cube_on_top_of_a_blue_sphere(pipeline: PixArtSigmaPipeline) -> None:
    """And not only with one seed: the judge reads both solids and their order in three of four images at least."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    prompts = ["a red cube on top of a blue sphere"] * 4
    images = pipeline(prompts, generator=generators, num_inference_steps=12).images
    assert {image.size for image in images} == {(256, 256)}
    assert sum(shows_the_demo(reading) for reading in read(images)) >= 3


@pytest.mark.long
@pytest.mark.parametrize(("height", "width"), [(256, 256), (192, 320), (288, 224)])
def test_it_follows_prompts_that_it_never_saw(pipeline: PixArtSigmaPipeline, height: int, width: int) -> None:
    prompts = held_out_prompts(6, seed=height)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    texts = [prompt.text for prompt in prompts]
    images = pipeline(texts, height=height, width=width, generator=generators).images
    assert {image.size for image in images} == {(width, height)}
    counts = judge_images(prompts, images).counts()
    for attribute, bar in (("colours", 0.9), ("shapes", 0.85), ("relations", 0.8), ("whole", 0.6)):
        hits, of = counts[attribute]
        assert hits >= bar * of, (attribute, hits, of)


def test_the_prompt_changes_the_image(pipeline: PixArtSigmaPipeline) -> None:
    def draw(prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return pipeline(prompt, generator=generator, num_inference_steps=8, output_type="pt").images[0]

    first, again, other = draw("a large red sphere"), draw("a large red sphere"), draw("a large green cube")
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.02
    assert first.std() > 0.05


def test_its_adapter_needs_four_steps_and_leaves_nothing_behind(pipeline: PixArtSigmaPipeline) -> None:
    name = "builtin:scenes-lcm"
    assert locate(name).stat().st_size <= 4_000_000
    chosen = ChosenAdapter.parse(name)
    assert adapter_defaults([chosen]) == AdapterDefaults("lcm", 4, 1.0)

    def draw(texts: list[str], **options: Any) -> Any:
        generators = [torch.Generator().manual_seed(i) for i in range(len(texts))]
        return pipe(texts, generator=generators, **options).images

    pipe = PixArtSigmaPipeline.from_pipe(pipeline)
    before = draw(["a red cube"], num_inference_steps=1, output_type="pt")
    pipe.load_lora_weights(name)
    pipe.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    prompts = held_out_prompts(8, seed=4)
    images = draw([prompt.text for prompt in prompts], num_inference_steps=4, guidance_scale=1.0)
    counts = judge_images(prompts, images).counts()
    for attribute, bar in (("colours", 0.85), ("shapes", 0.8), ("relations", 0.8), ("whole", 0.6)):
        hits, of = counts[attribute]
        assert hits >= bar * of, (attribute, hits, of)
    pipe.unload_lora_weights()
    pipe.scheduler = pipeline.scheduler
    assert torch.equal(draw(["a red cube"], num_inference_steps=1, output_type="pt"), before)
