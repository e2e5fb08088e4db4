"""Guidance in an interval: which steps are guided, what the others cost, and that it can be undone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from impasto.errors import ConfigurationError, InputError
from impasto.pipelines.pixart import PixArtSigmaPipeline
from impasto.schedulers.ddim import DDIMScheduler
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler
from impasto.transforms.guidance_interval import guide_between, noise_levels
from impasto.transforms.step_cache import cache_steps

from ..tiny import tiny_pipeline

STEPS = 5


@pytest.fixture
def pipe() -> PixArtSigmaPipeline:
    return tiny_pipeline(PixArtSigmaPipeline)


def generate(pipe: PixArtSigmaPipeline, **arguments: Any) -> Tensor:
    call = {"prompt": "a red cube", "num_inference_steps": STEPS, "output_type": "latent", **arguments}
    images: Tensor = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    return images


def rows(pipe: PixArtSigmaPipeline, **arguments: Any) -> list[int]:
    """The batch of each call of the transformer."""
    found = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0].shape[0]))
    generate(pipe, **arguments)
    hook.remove()
    return found


@pytest.mark.parametrize("prompt", ["a red cube", ["a cat", "a dog", "sky"]])
def test_the_whole_interval_changes_nothing(pipe: PixArtSigmaPipeline, prompt: Any) -> None:
    plain = generate(pipe, prompt=prompt)
    with guide_between(pipe, 0, 1):
        assert torch.equal(generate(pipe, prompt=prompt), plain)
    with guide_between(pipe, 0, math.inf, by="noise"):
        assert torch.equal(generate(pipe, prompt=prompt), plain)


@pytest.mark.parametrize("prompt", ["a red cube", ["a cat", "a dog", "sky"]])
def test_an_empty_interval_is_no_guidance(pipe: PixArtSigmaPipeline, prompt: Any) -> None:
    plain = generate(pipe, prompt=prompt, guidance_scale=1.0)
    with guide_between(pipe, 0.5, 0.5):
        assert torch.equal(generate(pipe, prompt=prompt), plain)
    with guide_between(pipe, 0, 0, by="noise"):
        assert torch.equal(generate(pipe, prompt=prompt), plain)


def test_outside_of_the_interval_the_batch_is_halved(pipe: PixArtSigmaPipeline) -> None:
    assert rows(pipe) == [2] * STEPS
    with guide_between(pipe, 0.2, 0.8):
        assert rows(pipe) == [1, 2, 2, 2, 1]
        assert rows(pipe, prompt=["a cat", "a dog"]) == [2, 4, 4, 4, 2]
        assert rows(pipe, guidance_scale=1.0) == [1] * STEPS
    with guide_between(pipe, 0.0, 0.5):
        assert rows(pipe) == [2, 2, 2, 1, 1]


def test_the_text_is_encoded_once_for_each_kind_of_step(pipe: PixArtSigmaPipeline) -> None:
    calls = 0
    encode = pipe.transformer.encode_context

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return encode(*arguments)

    pipe.transformer.encode_context = counted
    with guide_between(pipe, 0.2, 0.8):
        generate(pipe)
    assert calls == 3  # both halves for the guided steps, one for the others


def test_the_noise_levels_are_those_of_the_schedule() -> None:
    scheduler = DDIMScheduler(num_train_timesteps=4, trained_betas=[0.5, 0.5, 0.5, 0.5])
    # ᾱ = 1/2, 1/4, 1/8, 1/16: σ² = 1, 3, 7, 15
    assert noise_levels(scheduler, torch.tensor([3, 1, 0])) == pytest.approx([15**0.5, 3**0.5, 1.0])
    assert noise_levels(scheduler, torch.tensor([0.5])) == pytest.approx([3**0.25])  # halfway in the logarithm
    scheduler.alphas_cumprod[-1] = 0.0
    assert noise_levels(scheduler, torch.tensor([3.0, 2.5, 2.0])) == pytest.approx([math.inf, math.inf, 7**0.5])


def test_an_interval_of_noise_levels(pipe: PixArtSigmaPipeline) -> None:
    pipe.scheduler.set_timesteps(STEPS)
    sigmas = noise_levels(pipe.scheduler, pipe.scheduler.timesteps)
    assert sigmas == sorted(sigmas, reverse=True)
    with guide_between(pipe, sigmas[3], sigmas[1], by="noise"):  # the lower end is not in it, the upper one is
        assert rows(pipe) == [1, 2, 2, 1, 1]


def test_a_scheduler_without_noise_levels() -> None:
    with pytest.raises(ConfigurationError, match=r"object has no alphas_cumprod.*give the interval by step"):
        noise_levels(object(), torch.tensor([1]))
    flow = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ConfigurationError, match="give the interval by step"):
        noise_levels(flow, torch.tensor([1]))


def test_removal_undoes_everything(pipe: PixArtSigmaPipeline) -> None:
    before, plain = set(vars(pipe)), generate(pipe)
    interval = guide_between(pipe, 0.4, 0.6)
    assert not torch.equal(generate(pipe), plain)
    interval.remove()
    assert set(vars(pipe)) == before
    assert torch.equal(generate(pipe), plain)
    interval.remove()


def test_together_with_cached_steps(pipe: PixArtSigmaPipeline) -> None:
    """Where guidance begins and ends the rows change, and what was cached is not used."""
    with guide_between(pipe, 0.4, 0.8):  # 1 1 2 2 1
        plain = generate(pipe)
        with cache_steps(pipe, "interval", interval=1):
            assert torch.equal(generate(pipe), plain)
        with cache_steps(pipe, "interval", interval=100, last=0) as cache:
            generate(pipe)
        assert (cache.computed, cache.reused) == (3, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.8, 0.2), "start 0.8 is above end 0.2"),
        ((-0.1, 1.0), "start must be a number from 0 to 1"),
        ((0.0, 2.0), "end must be a number from 0 to 1"),
        ((0.0, math.nan), "end must be a number from 0 to 1"),
        ((0.0, -1.0, "noise"), "end must be a number from 0 to inf"),
        ((0.0, 1.0, "time"), "by must be one of step, noise"),
    ],
)
def test_bad_arguments(pipe: PixArtSigmaPipeline, arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        guide_between(pipe, *arguments)
    assert "guidance_of_steps" not in vars(pipe)


def test_what_cannot_be_guided(pipe: PixArtSigmaPipeline) -> None:
    with pytest.raises(InputError, match="takes a pipeline with guidance, not object"):
        guide_between(object(), 0, 1)
    with guide_between(pipe, 0, 1), pytest.raises(ConfigurationError, match="already"):
        guide_between(pipe, 0, 0.5)
