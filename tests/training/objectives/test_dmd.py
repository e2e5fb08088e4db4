"""Distribution matching distillation: its gradients by an independent formula, and that one step learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from impasto.errors import ConfigurationError
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.pipelines.pixart import PixArtAlphaPipeline
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler
from impasto.training.objectives.base import ByStep
from impasto.training.objectives.dmd import DistributionMatching
from impasto.training.running.loop import train
from impasto.training.running.randomness import Randomness

from ...tiny import tiny_pipeline, tiny_text_encoder, tiny_transformer
from ..runs import settings
from ..teachers import BETAS, flat, parts, teacher


def objective(
    transformer: PixArtTransformer2DModel, kind: str = "v_prediction", **options: Any
) -> DistributionMatching:
    return DistributionMatching(*parts(transformer, kind), **options)


def measured(one: DistributionMatching) -> float:
    one.eval()
    return float(one.validation(flat(10**6), Randomness(1, 0))["distance"])


def test_the_gradients_are_those_of_the_paper() -> None:
    """In float64, with epsilon models."""
    one = objective(tiny_transformer(sample_size=4), "epsilon", pair_steps=1)
    models = {name: tiny_transformer(i, sample_size=4).double() for i, name in enumerate(("real", "generator", "fake"))}
    one.transformer.load_state_dict(models["generator"].state_dict())
    one.fake.load_state_dict(models["fake"].state_dict())
    batch = flat(0, 3)
    loss = one(batch, Randomness(3, 0))
    loss.each.mean().backward()

    random = Randomness(3, 0)
    z = random.normal([3, 4, 4, 4]).double()
    t, r = (random.integers(950, [3]) + 1 for _ in range(2))
    noise, other = (random.normal(z.shape).double() for _ in range(2))
    bars = (1 - BETAS.double()).cumprod(0)
    texts = {empty: one.texts(batch.samples, torch.full([3], empty)) for empty in (False, True)}

    def levels(at: Tensor) -> tuple[Tensor, Tensor]:
        return bars[at].sqrt().view(-1, 1, 1, 1), (1 - bars[at]).sqrt().view(-1, 1, 1, 1)

    def epsilon(name: str, x: Tensor, at: Tensor, empty: bool = False) -> Tensor:
        text, mask = texts[empty]
        output: Tensor = models[name](x, text.double(), at, encoder_attention_mask=mask).sample
        return output[:, :4]

    def mu(prediction: Tensor, x: Tensor, at: Tensor) -> Tensor:
        alpha, sigma = levels(at)
        return (x - sigma * prediction) / alpha

    at_400 = torch.full([3], 400)
    x = mu(epsilon("generator", z, at_400), z, at_400)
    with torch.no_grad():
        alpha, sigma = levels(t)
        xt = alpha * x + sigma * noise
        unconditional = epsilon("real", xt, t, empty=True)
        real = mu(unconditional + 7.5 * (epsilon("real", xt, t) - unconditional), xt, t)
        weight = (x - real).abs().mean((1, 2, 3), keepdim=True)
        gradient = (mu(epsilon("fake", xt, t), xt, t) - real) / weight
        first = torch.full([3], 999)
        unconditional = epsilon("real", z, first, empty=True)
        wanted = mu(unconditional + 7.5 * (epsilon("real", z, first) - unconditional), z, first)
    alpha, sigma = levels(r)
    denoising = (epsilon("fake", alpha * x.detach() + sigma * other, r) - other).square().mean()
    regression = (x - wanted).square().mean()
    # d/dx of the matching term is the gradient itself, for the mean over images and values.
    (x * gradient).sum().div(x.numel()).add(denoising + 0.25 * regression).backward()

    torch.testing.assert_close(loss.parts["regression"].double().mean(), regression.detach(), rtol=1e-4, atol=1e-6)
    for name, ours in (("generator", one.transformer), ("fake", one.fake)):
        for (key, expected), found in zip(models[name].named_parameters(), ours.parameters(), strict=True):
            wanted_gradient = torch.zeros_like(expected) if expected.grad is None else expected.grad
            assert found.grad is not None
            scale = float(wanted_gradient.abs().max()) + 1e-9
            assert float((found.grad - wanted_gradient).abs().max()) < 1e-3 * scale + 1e-6, (name, key)


@pytest.mark.long
def test_one_step_comes_nearer_to_the_teachers_images(tmp_path: Path) -> None:
    one = objective(teacher(), guidance_scale=5.0, pair_steps=2, regression_weight=1.0)
    before = measured(one)
    plan = settings(30, optimizer={"name": "adamw", "rate": 5e-3}, ema=0.0)
    train(one, ByStep(flat), plan, tmp_path)
    assert measured(one) < 0.8 * before


@torch.no_grad()
def test_the_pipeline_generates_what_the_generator_does() -> None:
    one = objective(tiny_transformer(sample_size=4), "epsilon")
    scheduler = one.scheduler({"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"})
    pipe = tiny_pipeline(
        PixArtAlphaPipeline,
        transformer=one.transformer,
        scheduler=scheduler,
        text_encoder=tiny_text_encoder(num_layers=1),
    )
    z = torch.randn(1, 4, 4, 4)
    given = one.given(flat(0, 1).samples, torch.device("cpu"))
    prompt = flat(0, 1).samples[0].caption
    options: dict[str, Any] = {"timesteps": [400], "guidance_scale": 1.0, "output_type": "latent", "height": 8}
    latents = pipe(prompt, latents=z, width=8, use_resolution_binning=False, **options).images
    torch.testing.assert_close(latents, one.generate(z, given), rtol=1e-3, atol=1e-4)


def test_the_sampler_has_the_noise_schedule_of_the_teacher() -> None:
    teachers = DPMSolverMultistepScheduler(rescale_betas_zero_snr=True, beta_end=0.03)
    found = objective(tiny_transformer(sample_size=4), "epsilon").scheduler(teachers.config)
    torch.testing.assert_close(found.alphas_cumprod[:-1], teachers.alphas_cumprod[:-1])


def test_pairs_of_samples_are_used(tmp_path: Path) -> None:
    one = objective(tiny_transformer(sample_size=4))
    batch = flat(0, 2)
    for sample in batch.samples:
        sample.extra = {"noise": torch.randn(4, 4, 4), "latents": torch.randn(4, 4, 4)}
    z = torch.randn(2, 4, 4, 4)
    given = one.given(batch.samples, z.device)
    pair = one.pair(batch.samples, z, given, given, z.device)
    assert pair is not None
    assert torch.equal(pair[1], torch.stack([sample.extra["latents"] for sample in batch.samples]))
    loss = one(batch, Randomness(0, 0))
    assert bool(loss.parts["regression"].isfinite().all())


def test_what_cannot_be_distilled_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="timesteps"):
        objective(tiny_transformer(sample_size=4), noise_levels=(1, 1000))
    with pytest.raises(ConfigurationError, match="adapter"):
        objective(tiny_transformer(sample_size=4).requires_grad_(False))
