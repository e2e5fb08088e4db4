"""The checkpoint that comes with the package. How well it draws is measured by `impasto evaluate`."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F

from impasto.checkpoints.hub import resolve
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.scenes.dataset import scene_batch
from impasto.scenes.evaluate import held_out_prompts, judge_images
from impasto.scenes.judge import read
from impasto.scenes.reading import Reading
from impasto.scenes.world import ON_TOP
from impasto.training.objectives.autoencoder import psnr


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


def test_diffusers_draws_the_same(folder: Path, pipeline: PixArtSigmaPipeline) -> None:
    theirs = diffusers.PixArtSigmaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "output_type": "latent", "use_resolution_binning": False}
    found, expected = (
        pipe(["a red cube", "a small green cone behind a blue sphere"], generator=torch.Generator(), **options).images
        for pipe in (pipeline, theirs)
    )
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-4


def test_its_autoencoder_keeps_images(pipeline: PixArtSigmaPipeline) -> None:
    images = scene_batch(seed=77, geometries=24, colourings=1).images
    halved = F.avg_pool2d(images.float(), 2) / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(halved).latent_dist.mode()
        back = pipeline.vae.decode(latents).sample
    assert psnr(halved, back) > 32.0
    scaled = latents * pipeline.vae.config.scaling_factor
    assert scaled.mean().abs() < 0.1
    assert 0.9 < scaled.std() < 1.1


def shows_the_demo(reading: Reading) -> bool:
    solids = [(solid.color, solid.shape) for solid in reading.solids]
    return solids == [("red", "cube"), ("blue", "sphere")] and reading.relations == (ON_TOP,)


def test_it_draws_a_red_cube_on_top_of_a_blue_sphere(pipeline: PixArtSigmaPipeline) -> None:
    """And not only with one seed: the judge reads both solids and their order in five of six images at least."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    images = pipeline(["a red cube on top of a blue sphere"] * 6, generator=generators).images
    assert sum(shows_the_demo(reading) for reading in read(images)) >= 5


def test_it_follows_prompts_that_it_never_saw(pipeline: PixArtSigmaPipeline) -> None:
    prompts = held_out_prompts(24, seed=3)
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images = pipeline([prompt.text for prompt in prompts], generator=generators).images
    counts = judge_images(prompts, images).counts()
    for attribute, bar in (("colours", 0.9), ("shapes", 0.85), ("relations", 0.85), ("whole", 0.6)):
        hits, of = counts[attribute]
        assert hits >= bar * of, (attribute, hits, of)


def test_the_prompt_changes_the_image(pipeline: PixArtSigmaPipeline) -> None:
    def draw(prompt: str) -> torch.Tensor:
        return pipeline(prompt, generator=torch.Generator().manual_seed(3), output_type="pt").images[0]

    first, again, other = draw("a large red sphere"), draw("a large red sphere"), draw("a large green cube")
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.02
    assert first.std() > 0.05
