"""Training of a tiny autoencoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from impasto.models.autoencoder.model import AutoencoderKL
from impasto.training.data.sample import Batch, Sample
from impasto.training.objectives.autoencoder import Autoencoder, edges, psnr, standardize
from impasto.training.objectives.base import ByStep
from impasto.training.optimizers import make_optimizers
from impasto.training.optimizers.muon import Muon
from impasto.training.running.loop import train
from impasto.training.running.randomness import Randomness
from impasto.training.settings.config import OptimizerSettings, Settings

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


def test_edges_count_differences_between_neighbours_along_both_sides() -> None:
    flat = torch.full((2, 3, 4, 4), 0.3)
    assert torch.equal(edges(flat), torch.zeros(2))
    step = torch.zeros(1, 3, 4, 4)
    step[..., 2:] = 1.0  # one of three differences along a row
    torch.testing.assert_close(edges(step), torch.tensor([1 / 3]))
    torch.testing.assert_close(edges(step.mT), torch.tensor([1 / 3]))


def test_weights_of_edges_and_of_half_the_scale_add_to_the_loss() -> None:
    vae = small_vae()
    batch, random = samples(0), Randomness(0, 0)
    plain = Autoencoder(vae)(batch, random)
    more = Autoencoder(vae, edge_weight=2.0, half_scale_weight=3.0)(batch, Randomness(0, 0))
    expected = plain.each + 2 * more.parts["edges"] + 3 * more.parts["half_scale"]
    torch.testing.assert_close(more.each, expected)
    assert (more.parts["edges"] > 0).all()
    assert (more.parts["half_scale"] > 0).all()


def test_muon_takes_the_kernels_of_residual_layers() -> None:
    named = dict(small_vae().named_parameters())
    muon, _ = make_optimizers(named, OptimizerSettings(name="muon"))
    by_id = {id(p): name for name, p in named.items()}
    kernels = {by_id[id(p)] for group in muon.param_groups for p in group["params"]}
    assert kernels == {n for n, p in named.items() if p.ndim == 4 and ("resnets" in n or "samplers" in n)}
    parameter = named["decoder.mid_block.resnets.0.conv1.weight"].detach()
    matrix = parameter.flatten(1).clone()
    kernel = parameter.clone()
    gradient = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0))
    for tensor in (matrix, kernel):
        tensor.grad = gradient.view_as(tensor).clone()
        Muon([tensor], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(kernel.flatten(1), matrix)
    assert not torch.equal(kernel, parameter)


@torch.no_grad()
def test_standardized_latents_have_mean_0_and_deviation_1_and_images_stay_the_same() -> None:
    vae, images = small_vae(), patchwork(3)
    before = vae.encode(images).latent_dist
    decoded = vae.decode(before.mean).sample
    latents = before.mean.transpose(0, 1).flatten(1)  # [C, all]
    standardize(vae, latents.mean(1), latents.std(1))
    after = vae.encode(images).latent_dist
    scaled = (after.mean * vae.config["scaling_factor"]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(scaled.mean(1), torch.zeros(len(scaled)), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(1), torch.ones(len(scaled)), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        after.std / before.std,
        after.mean.std((0, 2, 3), keepdim=True).expand_as(after.std) / before.mean.std((0, 2, 3), keepdim=True),
        atol=1e-3,
        rtol=1e-3,
    )
    torch.testing.assert_close(vae.decode(after.mean).sample, decoded, atol=1e-3, rtol=1e-3)
