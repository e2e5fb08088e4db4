"""Latent consistency distillation: its loss by an independent formula, its sampler, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from impasto.errors import ConfigurationError
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler
from impasto.schedulers.lcm import LCMScheduler
from impasto.training.distributed.parallel import chosen
from impasto.training.distributed.processes import Processes
from impasto.training.objectives.base import ByStep
from impasto.training.objectives.lcm import LatentConsistency
from impasto.training.running.loop import train
from impasto.training.running.randomness import Randomness

from ...tiny import tiny_transformer
from ..runs import settings
from ..teachers import BETAS, flat, parts, teacher

HELD_OUT = flat(10**6)


def objective(transformer: PixArtTransformer2DModel, kind: str = "v_prediction", **options: Any) -> LatentConsistency:
    return LatentConsistency(*parts(transformer, kind), **options)


def measured(one: LatentConsistency) -> float:
    one.eval()
    return float(one.validation(HELD_OUT, Randomness(1, 0))["distance"])


def formula(one: LatentConsistency, kind: str, models: dict[str, PixArtTransformer2DModel], w: float) -> Tensor:
    """The loss in float64, as the originals' script computes it: with w = 4.5 on top of the conditional prediction."""
    random = Randomness(3, 0)
    batch = flat(0, 4)
    x0 = one.latents(batch.samples, random, torch.device("cpu")).double()
    noise = random.normal(x0.shape).double()
    index = random.integers(50, [4])
    bars = (1 - BETAS.double()).cumprod(0)
    times = torch.arange(1, 51) * 20 - 1
    t = times[index]
    s = torch.where(t - 20 < 0, 0, t - 20)
    bar_s = torch.cat([bars[:1], bars[times[:-1]]])[index].view(-1, 1, 1, 1)  # as in their solver
    a, b = bars[t].sqrt().view(-1, 1, 1, 1), (1 - bars[t]).sqrt().view(-1, 1, 1, 1)

    def run(name: str, x: Tensor, at: Tensor, empty: bool) -> Tensor:
        text, mask = one.texts(batch.samples, torch.full([4], empty))
        output: Tensor = models[name].double()(x, text.double(), at, encoder_attention_mask=mask).sample
        return output[:, :4]

    def x0_and_noise(output: Tensor, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = bars[at].sqrt().view(-1, 1, 1, 1), (1 - bars[at]).sqrt().view(-1, 1, 1, 1)
        if kind == "epsilon":
            return (x - sigma * output) / alpha, output
        return alpha * x - sigma * output, alpha * output + sigma * x

    def consistency(name: str, x: Tensor, at: Tensor) -> Tensor:
        c_skip = 0.25 / ((at / 0.1) ** 2 + 0.25)
        c_out = (at / 0.1) / ((at / 0.1) ** 2 + 0.25) ** 0.5
        original, _ = x0_and_noise(run(name, x, at, False), x, at)
        return c_skip.view(-1, 1, 1, 1) * x + c_out.view(-1, 1, 1, 1) * original

    xt = a * x0 + b * noise
    (x0_c, noise_c), (x0_u, noise_u) = (x0_and_noise(run("teacher", xt, t, e), xt, t) for e in (False, True))
    x0_g, noise_g = x0_c + w * (x0_c - x0_u), noise_c + w * (noise_c - noise_u)
    xs = bar_s.sqrt() * x0_g + (1 - bar_s).sqrt() * noise_g
    difference = consistency("student", xt, t) - consistency("target", xs, s)
    return ((difference**2 + 1e-6).sqrt() - 1e-3).mean((1, 2, 3))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_the_loss_is_that_of_the_paper_with_the_originals_distance(kind: str) -> None:
    one = objective(tiny_transformer(sample_size=4), kind)
    other = tiny_transformer(seed=1, sample_size=4)
    one.transformer.load_state_dict(other.state_dict())
    one.after_step(1)  # the target is a mixture of both
    mixed = tiny_transformer(sample_size=4)
    for parameter, later in zip(mixed.parameters(), other.parameters(), strict=True):
        parameter.copy_(0.95 * parameter + 0.05 * later)
    models = {"teacher": tiny_transformer(sample_size=4), "student": other, "target": mixed}
    each = one(flat(0, 4), Randomness(3, 0)).each
    torch.testing.assert_close(each.double(), formula(one, kind, models, w=4.5), rtol=2e-4, atol=1e-5)
    for name, parameter in one.transformer.state_dict().items():
        assert torch.equal(parameter, tiny_transformer(seed=1, sample_size=4).state_dict()[name])


@torch.no_grad()
def test_the_sampler_is_that_of_the_pipelines() -> None:
    one = objective(tiny_transformer(sample_size=4))
    scheduler = one.scheduler({"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None})
    assert isinstance(scheduler, LCMScheduler)
    scheduler.register_to_config(prediction_type="v_prediction")
    scheduler.set_timesteps(4)
    x = noise = torch.randn(8, 4, 4, 4)
    given = one.given(HELD_OUT.samples, torch.device("cpu"))
    numbers = Randomness(5, 0)
    for t in scheduler.timesteps:
        prediction = one.predict(x, t.repeat(8), given)
        x = scheduler.step(prediction, t, x).denoised  # type: ignore[union-attr]
        index = scheduler.timesteps.tolist().index(int(t)) + 1
        if index < 4:
            x = one.loss.add_noise(x, numbers.normal(x.shape), scheduler.timesteps[index].repeat(8))
    torch.testing.assert_close(one.sample(noise, given, 4, Randomness(5, 0)), x, rtol=1e-4, atol=1e-4)


def test_the_sampler_has_the_noise_schedule_of_the_teacher() -> None:
    teachers = DPMSolverMultistepScheduler(rescale_betas_zero_snr=True, beta_end=0.03, prediction_type="v_prediction")
    found = objective(tiny_transformer(sample_size=4)).scheduler(teachers.config)
    assert found.config.prediction_type == "v_prediction"
    torch.testing.assert_close(found.alphas_cumprod[:-1], teachers.alphas_cumprod[:-1])
    assert found.alphas_cumprod[-1] < 1e-6


def test_four_steps_come_nearer_to_the_teachers_images(tmp_path: Path) -> None:
    one = objective(teacher(), intervals=10)
    before = measured(one)
    plan = settings(40, optimizer={"name": "adamw", "rate": 3e-3}, ema=0.0, checkpoints={"every": 20})
    train(one, ByStep(flat), plan, tmp_path)
    assert measured(one) < 0.9 * before
    again = objective(teacher(), intervals=10)
    train(again, ByStep(flat), plan, tmp_path)  # only the stored state
    assert measured(again) == measured(one)
    assert again.target is not None
    assert one.target is not None
    for name, value in one.target.state_dict().items():
        assert torch.equal(value, again.target.state_dict()[name]), name


def test_an_adapter_learns_with_its_base_as_the_teacher(tmp_path: Path) -> None:
    transformer = teacher().requires_grad_(False)
    base = {name: p.clone() for name, p in transformer.state_dict().items()}
    inject_adapter_in_model(
        LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_v", "linear", "proj_out"]), transformer
    )
    one = objective(transformer, intervals=10)
    assert all("lora_" in name for name in one.teacher.live)
    before = measured(one)
    given, empty = (one.given(HELD_OUT.samples, torch.device("cpu"), empty=empty) for empty in (False, True))
    noise = torch.randn(8, 4, 4, 4)
    images = one.samples_of_teacher(noise, given, empty, 4, 5.5)
    train(one, ByStep(flat), settings(40, optimizer={"name": "adamw", "rate": 1e-2}, ema=0.0), tmp_path)
    assert measured(one) < 0.95 * before
    torch.testing.assert_close(one.samples_of_teacher(noise, given, empty, 4, 5.5), images)
    for name, value in base.items():
        path, _, leaf = name.rpartition(".")
        stored = transformer.state_dict()
        assert torch.equal(stored.get(name, stored.get(f"{path}.base_layer.{leaf}")), value), name


def test_what_cannot_be_distilled_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="intervals"):
        objective(tiny_transformer(sample_size=4), intervals=2000)
    one = objective(tiny_transformer(sample_size=4))
    assert chosen(one, Processes(count=2, parallel="auto")) == "ddp"
    with pytest.raises(ConfigurationError, match="parallel: ddp"):
        chosen(one, Processes(count=2, parallel="fsdp"))
