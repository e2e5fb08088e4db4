"""Training of a tiny autoencoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from impasto.models.autoencoder.model import AutoencoderKL
from impasto.training.config import Settings
from impasto.training.data.sample import Batch, Sample
from impasto.training.loop import train
from impasto.training.objectives.autoencoder import Autoencoder, psnr
from impasto.training.objectives.base import ByStep

from ...tiny import tiny_vae
from ..runs import rows


def patchwork(seed: int) -> Tensor:
    """Images [4, 3, 16, 16] of sixteen patches each, in eight strong colours."""
    colours = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).round() * 1.6 - 0.8
    return colours.repeat_interleave(4, 2).repeat_interleave(4, 3)


def validation() -> Tensor:
    return patchwork(-1)


def small_vae(seed: int = 0) -> AutoencoderKL:
    return tiny_vae(seed, layers_per_block=1, mid_block_add_attention=False)


def samples(step: int) -> Batch:
    images = patchwork(step)
    return Batch([Sample(image=image) for image in images], 0, len(images), step)


def test_a_few_steps_reduce_the_error(tmp_path: Path) -> None:
    model = small_vae(seed=2)
    settings = Settings(
        steps=100,
        optimizer={"rate": 2e-2, "betas": (0.9, 0.99), "weight_decay": 0.0},
        schedule={"kind": "cosine", "warmup": 5, "floor": 0.02},
        checkpoints={"every": 20},
        log_every=100,
    )
    objective = Autoencoder(model)
    train(objective, ByStep(samples), settings, tmp_path, lambda step: {"psnr": objective.psnr(validation())})
    log = rows(tmp_path)
    assert [row["step"] for row in log] == [20, 40, 60, 80, 100]
    assert log[-1]["mse"] < 0.75 * log[0]["mse"]
    assert log[-1]["psnr"] > log[0]["psnr"] + 1.5
    blank = psnr(validation(), torch.zeros_like(validation()))
    assert log[-1]["psnr"] > blank + 2
    assert not model.training
    with torch.no_grad():
        decoded = model.decode(model.encode(validation()).latent_dist.mode()).sample
    assert psnr(validation(), decoded) == pytest.approx(log[-1]["psnr"], abs=1e-3)


@pytest.mark.parametrize(("error", "expected"), [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0), (0.0, 100.0)])
def test_psnr_of_a_known_error(error: float, expected: float) -> None:
    images = torch.full((2, 3, 4, 4), -1.0)
    assert psnr(images, images + error) == pytest.approx(expected, abs=1e-3)


def test_psnr_is_a_mean_over_images_and_clips_what_no_screen_can_show() -> None:
    images = torch.full((2, 3, 4, 4), 1.0)
    errors = torch.tensor([-0.2, -0.02]).view(2, 1, 1, 1)
    assert psnr(images, images + errors) == pytest.approx(30.0, abs=1e-3)
    assert psnr(images, images + 5) == pytest.approx(100.0)
