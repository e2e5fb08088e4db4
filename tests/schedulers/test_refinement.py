"""The steps of DPM-Solver++ that refine: averages of predictions with new noise; and where guidance ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from impasto.errors import ConfigurationError
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.pipelines.pixart_edits import PixArtSigmaImg2ImgPipeline
from impasto.pipelines.sampling import estimated
from impasto.schedulers.ddim import DDIMScheduler
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler
from impasto.transforms.guidance_interval import guide_between

from ..tiny import tiny_pipeline


def refining(below: int = 600, **options: Any) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(refine_below=below, prediction_type="sample", **options)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_formula_in_float64() -> None:
    scheduler = refining(below=600, refine_span=400.0)
    scheduler.set_timesteps(timesteps=[900, 599, 300, 20])
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    outputs, noises = (torch.randn(4, 1, 4, 3, 3, generator=seeded(seed), dtype=torch.float64) for seed in (0, 1))
    x, average = torch.randn(1, 4, 3, 3, generator=seeded(2), dtype=torch.float64), outputs[1]
    for index, t in enumerate(scheduler.timesteps):
        x = scheduler.step(outputs[index], t, x, variance_noise=noises[index]).prev_sample
        if index > 1:
            passed = (280, 20)[index - 2]
            average = average + (1 - math.exp(-passed / 400)) * (outputs[index] - average)
        if index in (1, 2):
            bar = bars[int(scheduler.timesteps[index + 1])]
            expected = bar.sqrt() * average + (1 - bar).sqrt() * noises[index]
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(x, average, rtol=0, atol=1e-6)  # the last step adds no noise


def test_the_image_that_a_step_implies_is_the_average() -> None:
    scheduler = refining(below=600)
    scheduler.set_timesteps(timesteps=[900, 599, 300, 20])
    x, outputs = torch.randn(1, 4, 3, 3), torch.randn(4, 1, 4, 3, 3)
    implied = []
    for index, t in enumerate(scheduler.timesteps):
        implied.append(scheduler.averaged(outputs[index], index))
        x = scheduler.step(outputs[index], t, x, generator=seeded(index)).prev_sample
    assert torch.equal(implied[0], outputs[0])
    assert torch.equal(implied[1], outputs[1])
    assert not torch.equal(implied[2], outputs[2])
    torch.testing.assert_close(implied[3], x, rtol=0, atol=1e-6)  # the last step adds no noise


def test_previews_show_the_average() -> None:
    scheduler = refining(below=600)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)
    x, outputs = torch.randn(1, 4, 3, 3), torch.randn(4, 1, 4, 3, 3)
    for index, t in enumerate(scheduler.timesteps):
        run: Any = SimpleNamespace(scheduler=scheduler, latents=x, index=index, known=None)
        preview = estimated(run, outputs[index])
        x = scheduler.step(outputs[index], t, x, generator=seeded(index)).prev_sample
    torch.testing.assert_close(preview, x, rtol=0, atol=1e-6)
    assert not torch.allclose(preview, outputs[3], atol=0.1)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_steps_before_are_those_of_the_solver(algorithm: str) -> None:
    x, outputs = torch.randn(1, 4, 3, 3), torch.randn(10, 1, 4, 3, 3)
    found = []
    for below in (0, 500):
        scheduler, y = refining(below, algorithm_type=algorithm), x
        scheduler.set_timesteps(10)
        for index, t in enumerate(scheduler.timesteps):
            y = scheduler.step(outputs[index], t, y, generator=seeded(index)).prev_sample
            found.append(y)
    solved, refined = found[:10], found[10:]
    first = sum(scheduler.timesteps.tolist()[i] >= 500 for i in range(10))
    assert first == 6
    assert all(map(torch.equal, solved[:first], refined[:first]))
    assert not any(map(torch.equal, solved[first:], refined[first:]))


def test_what_predictions_make_of_noise_is_averaged_out() -> None:
    """A model whose prediction of x_0 follows the noise in its input by a fifth."""
    truth, errors = torch.randn(1, 4, 32, 32, generator=seeded(0)), []
    for below in (0, 600):
        scheduler, x = refining(below), torch.randn(1, 4, 32, 32, generator=seeded(1))
        scheduler.set_timesteps(20)
        generator = seeded(2)
        for index, t in enumerate(scheduler.timesteps):
            alpha, sigma, _ = scheduler._level(index)
            noise = (x - alpha * truth) / sigma
            x = scheduler.step(truth + 0.2 * noise, t, x, generator=generator).prev_sample
        errors.append(float((x - truth).square().mean().sqrt()))
    assert errors[1] < errors[0] / 2


def test_another_schedule_starts_with_no_average() -> None:
    scheduler, results = refining(1000), []
    for _ in range(2):
        scheduler.set_timesteps(3)
        x = torch.zeros(1, 4, 3, 3)
        for t in scheduler.timesteps:
            x = scheduler.step(x + len(results), t, x, generator=seeded(0)).prev_sample
        results.append(x)
    assert float((results[1] - results[0]).abs().min()) > 0.5


def test_noise_solvers_cannot_refine() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot refine; set refine_below=0, or use dpmsolver\+\+"):
        DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min", refine_below=500)


# --- the config ---


def test_the_config_has_it_only_where_it_is_used(tmp_path: Path) -> None:
    DPMSolverMultistepScheduler().save_pretrained(tmp_path / "without")
    refining(500).save_pretrained(tmp_path / "with")
    written = [json.loads((tmp_path / n / "scheduler_config.json").read_text()) for n in ("without", "with")]
    assert set(written[1]) - set(written[0]) == {"refine_below"}
    again = DPMSolverMultistepScheduler.from_pretrained(tmp_path / "with")
    assert again.config.refine_below == again._refine_below == 500


def test_diffusers_and_other_schedulers_ignore_it(tmp_path: Path) -> None:
    refining(500).save_pretrained(tmp_path)
    theirs = diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    theirs.set_timesteps(4)
    plain = DPMSolverMultistepScheduler.from_config(theirs.config, refine_below=0)
    plain.set_timesteps(4)
    x = torch.randn(1, 4, 3, 3)
    for t in plain.timesteps:
        expected = theirs.step(x / 2, t, x).prev_sample
        x = plain.step(x / 2, t, x).prev_sample
        torch.testing.assert_close(x, expected)
    ddim = DDIMScheduler.from_config(refining(500).config)
    assert DPMSolverMultistepScheduler.from_config(ddim.config).config.refine_below == 500


# --- pipelines ---


def generate(pipe: Any, **arguments: Any) -> tuple[Tensor, list[int]]:
    """The latents, and the batch of each call of the transformer."""
    rows: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[0]))
    call = {"prompt": "a red cube", "num_inference_steps": 5, "output_type": "latent", **arguments}
    images: Tensor = pipe(**call, generator=seeded(0)).images
    hook.remove()
    return images, rows


def test_guidance_ends_where_the_config_says_unless_an_interval_says_otherwise() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, guide_above=600)
    assert generate(pipe)[1] == [2, 2, 1, 1, 1]
    assert generate(pipe, guidance_scale=1.0)[1] == [1] * 5
    with guide_between(pipe, 0, 1):
        assert generate(pipe)[1] == [2] * 5
    with guide_between(pipe, 0, 0.2):
        assert generate(pipe)[1] == [2, 1, 1, 1, 1]
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, guide_above=-1)
    assert generate(pipe)[1] == [2] * 5


def test_an_image_to_edit_may_start_where_steps_refine() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, refine_below=600)
    edit = PixArtSigmaImg2ImgPipeline.from_pipe(pipe)
    image = torch.rand(1, 3, 64, 64, generator=seeded(1))
    found, rows = generate(edit, image=image, strength=0.4)
    assert rows == [2, 2]
    assert found.isfinite().all()
