"""FlowMatchEulerDiscreteScheduler: it solves what it says, and refuses what makes no schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from impasto import FlowMatchEulerDiscreteScheduler
from impasto.errors import ConfigurationError, InputError


@pytest.mark.parametrize("config", [{}, {"shift": 4.0}, {"use_karras_sigmas": True}, {"shift_terminal": 0.1}])
def test_a_true_velocity_leads_to_the_image_in_any_number_of_steps(config: dict[str, Any]) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    torch.manual_seed(0)
    image, noise = torch.randn(2, 1, 4, 4, 4)
    for steps in (2, 9):
        scheduler.set_timesteps(steps)
        x = scheduler.scale_noise(image, scheduler.timesteps[:1], noise)
        for t in scheduler.timesteps:
            x = scheduler.step(noise - image, t, x).prev_sample
        torch.testing.assert_close(x, image, rtol=1e-5, atol=1e-5)


def test_a_shift_spends_more_steps_where_there_is_much_noise() -> None:
    levels = []
    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(10)
        levels.append(scheduler.sigmas[5].item())
    assert levels[1] > levels[0]
    assert scheduler.sigmas[-1] == 0
    scheduler.set_shift(1.0)
    scheduler.set_timesteps(10)
    assert scheduler.shift == 1.0
    assert scheduler.sigmas[5].item() < levels[1]


def test_half_precision_keeps_small_steps() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    x = torch.full((1, 2), 256.0, dtype=torch.bfloat16)  # whose neighbours are 254 and 258
    velocity = torch.full_like(x, 12.0)
    out = scheduler.step(velocity, scheduler.timesteps[0], x).prev_sample  # 256 - 0.333 · 12, rounded once
    assert out.dtype == torch.bfloat16
    assert out.tolist() == [[252.0, 252.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "no steps"),
        ({"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "2 and 3"),
        ({"sigmas": [1.0, 0.5], "timesteps": [900.0]}, "1 and 2"),
        ({"sigmas": [0.5, 1.0]}, "descend"),
        ({"sigmas": [2.0, 1.0]}, "descend"),
        ({"timesteps": [500.0, 0.0]}, "descend"),
        ({"sigmas": []}, "one or more"),
        ({"num_inference_steps": 0}, "from 1 to"),
        ({"num_inference_steps": 2.5}, "whole number"),
    ],
)
def test_what_makes_no_schedule_is_refused(call: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FlowMatchEulerDiscreteScheduler().set_timesteps(**call)


def test_bad_values_are_refused() -> None:
    with pytest.raises(InputError, match="two steps or more"):
        FlowMatchEulerDiscreteScheduler(shift_terminal=0.1).set_timesteps(1)
    with pytest.raises(InputError, match="give mu"):
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).set_timesteps(3)
    for config in (
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
        {"time_shift_type": "cubic"},
        {"shift": 0},
        {"shift_terminal": 1.0},
        {"num_train_timesteps": 0},
    ):
        with pytest.raises(ConfigurationError, match=next(iter(config))):
            FlowMatchEulerDiscreteScheduler(**config)  # type: ignore[arg-type]
    scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(InputError, match="set_timesteps"):
        scheduler.step(torch.zeros(1, 2), 1.0, torch.zeros(1, 2))
    scheduler.set_timesteps(1)
    with pytest.raises(InputError, match="not in the schedule"):
        scheduler.step(torch.zeros(1, 2), 3, torch.zeros(1, 2))
    scheduler.step(torch.zeros(1, 2), scheduler.timesteps[0], torch.zeros(1, 2))
    with pytest.raises(InputError, match="all 1 steps"):
        scheduler.step(torch.zeros(1, 2), scheduler.timesteps[0], torch.zeros(1, 2))
    with pytest.raises(InputError, match="above 0"):
        scheduler.set_shift(-1)


def test_steps_and_noise_follow_assigned_sigmas() -> None:
    """As pipelines show the schedule of the last run."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    scheduler.sigmas = torch.tensor([1.0, 0.5, 0.25, 0.125, 0.0])
    ones, zeros = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    assert scheduler.scale_noise(zeros, scheduler.timesteps[1:2], ones).unique().tolist() == [0.5]
    assert scheduler.step(ones, scheduler.timesteps[0], zeros).prev_sample.unique().tolist() == [-0.5]


def test_there_may_be_more_steps_than_training_timesteps() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=10)
    scheduler.set_timesteps(15)
    assert len(scheduler.timesteps) == 15
    with pytest.raises(InputError, match="num_inference_steps"):
        scheduler.set_timesteps(10**9)
