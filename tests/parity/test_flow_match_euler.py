"""FlowMatchEulerDiscreteScheduler against the diffusers class: its schedules, and whole runs step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from impasto import FlowMatchEulerDiscreteScheduler

CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "shift 3": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True},
    "dynamic, linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "glm image": {
        "use_dynamic_shifting": True,
        "time_shift_type": "linear",
        "base_shift": 0.25,
        "max_shift": 0.75,
        "base_image_seq_len": 256,
    },
    "terminal": {"shift_terminal": 0.1},
    "dynamic, terminal": {"shift_terminal": 0.02, "use_dynamic_shifting": True},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True, "shift": 2.0},
    "beta": {"use_beta_sigmas": True},
    "inverted": {"invert_sigmas": True},
    "stochastic": {"stochastic_sampling": True},
    "ten training steps": {"num_train_timesteps": 10},
}

SCHEDULES: dict[str, dict[str, Any]] = {
    "steps": {"num_inference_steps": 7},
    "one step": {"num_inference_steps": 1},
    "sigmas": {"sigmas": [1.0, 0.7, 0.33, 0.05]},
    "timesteps": {"timesteps": [9.0, 6.0, 5.0, 1.0]},
    "both": {"timesteps": [9.0, 6.0, 5.0, 1.0], "sigmas": [1.0, 0.7, 0.33, 0.05], "num_inference_steps": 4},
}


def pair(**config: Any) -> tuple[FlowMatchEulerDiscreteScheduler, Any]:
    return FlowMatchEulerDiscreteScheduler(**config), diffusers.FlowMatchEulerDiscreteScheduler(**config)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x) + 0.001 * t


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_schedules_and_runs(config: dict[str, Any], schedule: dict[str, Any]) -> None:
    ours, reference = pair(**config)
    np.testing.assert_allclose(ours.timesteps, reference.timesteps, rtol=1e-6)
    np.testing.assert_allclose(ours.sigmas, reference.sigmas, rtol=1e-6)
    one = "one step" in SCHEDULES and schedule == SCHEDULES["one step"]
    if one and config.get("shift_terminal"):
        schedule = {"num_inference_steps": 2}  # one level cannot be stretched: it is 1 and stays there
    mu = {"mu": 0.7} if config.get("use_dynamic_shifting") else {}
    ours.set_timesteps(**schedule, **mu)
    reference.set_timesteps(**schedule, **mu)
    np.testing.assert_allclose(ours.sigmas, reference.sigmas, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(ours.timesteps, reference.timesteps, rtol=2e-6, atol=1e-7)

    torch.manual_seed(0)
    x = y = torch.randn(2, 4, 3, 3)
    generators = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for t, u in zip(ours.timesteps, reference.timesteps, strict=True):
        x = ours.step(velocity(x, t), t, x, generator=generators[0]).prev_sample
        y = reference.step(velocity(y, u), u, y, generator=generators[1]).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_noise_is_mixed_alike() -> None:
    ours, reference = pair(shift=2.0)
    for scheduler in (ours, reference):
        scheduler.set_timesteps(5)
    torch.manual_seed(0)
    x, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    t = ours.timesteps[[1, 3]]
    torch.testing.assert_close(ours.scale_noise(x, t, noise), reference.scale_noise(x, t, noise))
    for scheduler in (ours, reference):
        scheduler.set_begin_index(2)
    torch.testing.assert_close(ours.scale_noise(x, t, noise), reference.scale_noise(x, t, noise))


def test_tokens_on_ways_of_their_own_go_towards_the_picture() -> None:
    """The reference goes the other way: the sign of its step per token is the opposite of that of its other steps."""
    ours, reference = pair()
    for scheduler in (ours, reference):
        scheduler.set_timesteps(4)
    torch.manual_seed(0)
    x, v = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    t = ours.timesteps[1]
    found = ours.step(v, t, x, per_token_timesteps=t.expand(2, 5)).prev_sample
    theirs = reference.step(v, t, x, per_token_timesteps=t.expand(2, 5)).prev_sample
    ours.set_timesteps(4)
    expected = ours.step(v, t, x).prev_sample
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(theirs, 2 * x - expected)


def test_folders_both_ways(tmp_path: Path) -> None:
    ours, reference = pair(**CONFIGS["glm image"])
    ours.save_pretrained(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    back = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "ours")
    loaded = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "theirs")
    for scheduler in (back, loaded):
        assert scheduler.config.max_shift == 0.75
        assert scheduler.config.time_shift_type == "linear"
