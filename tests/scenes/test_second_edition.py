"""The components of the bundled model's second edition that exist."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import impasto.scenes.source
from impasto.models.autoencoder.model import AutoencoderKL
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.scenes.check import check_pipeline
from impasto.scenes.source import ScenesSource
from impasto.training.objectives.autoencoder import psnr
from impasto.training.settings import recipe_files as recipes

FOLDER = Path(impasto.scenes.source.__file__).parent / "second"


@pytest.fixture(scope="module")
def images() -> Tensor:
    source = ScenesSource(6, 77, [(256, 256)])
    read = [source.read(index, (256, 256), np.random.default_rng(index)).image for index in range(6)]
    return torch.stack([image for image in read if image is not None])


@torch.no_grad()
def test_the_autoencoder_is_small_and_reconstructs_unseen_scenes(images: Tensor) -> None:
    assert sum(path.stat().st_size for path in (FOLDER / "vae").iterdir()) <= 2_000_000
    assert AutoencoderKL.from_pretrained(FOLDER / "vae", dtype="auto").dtype == torch.float16
    vae = AutoencoderKL.from_pretrained(FOLDER / "vae")
    recipe = recipes.read("scenes-autoencoder").models.vae.config
    assert {name: vae.config[name] for name in recipe} == recipe
    latents = torch.cat([vae.encode(image[None]).latent_dist.mode() for image in images])  # [B, 16, 32, 32]
    assert latents.shape == (6, 16, 32, 32)
    reconstructions = torch.cat([vae.decode(each[None]).sample for each in latents])
    assert psnr(images, reconstructions) >= 33
    scaled = (latents * vae.config["scaling_factor"]).transpose(0, 1).flatten(1)
    assert scaled.mean(1).abs().max() < 0.6  # of six images; the mean and the deviation of many are 0 and 1
    assert 0.3 < float(scaled.std(1).min()) <= float(scaled.std(1).max()) < 2


def test_the_text_encoder_has_the_architecture_of_its_recipe() -> None:
    config = json.loads((FOLDER / "text_encoder" / "config.json").read_text())
    recipe = dict(recipes.read("scenes-text-encoder").models.text_encoder.config)
    del recipe["tie_word_embeddings"]  # transformers stores True for every encoder
    assert {name: config[name] for name in recipe} == recipe
    assert config["dtype"] == "float16"
    assert (FOLDER / "text_encoder" / "model.safetensors").stat().st_size <= 1_400_000


def test_the_transformer_so_far_follows_prompts() -> None:
    """A state to train on from: what is shown is right, and edges are not straight yet."""
    pipe = PixArtSigmaPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.config["sample_size"] == 32
    found = check_pipeline(pipe, {"prompts": 4, "height": 256, "width": 256, "num_inference_steps": 8})
    assert found["scenes colours"] >= 0.8
    assert found["scenes relations"] >= 0.5
