"""Betas, noise levels and timesteps, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from impasto.errors import InputError
from impasto.schedulers import noise_schedule as schedules
from impasto.schedulers.betas import cosine_betas, rescale_zero_terminal_snr, scaled_linear_betas
from impasto.schedulers.ddpm import DDPMScheduler


def table() -> schedules.Array:
    return schedules.noise_levels(DDPMScheduler().alphas_cumprod)


def test_zero_terminal_snr_keeps_the_first_level_and_ends_in_pure_noise() -> None:
    betas = scaled_linear_betas(1000, 0.00085, 0.012)
    rescaled = rescale_zero_terminal_snr(betas)
    bars = torch.cumprod(1 - rescaled, dim=0)
    assert bars[-1] == 0
    torch.testing.assert_close(bars[0], 1 - betas[0])
    assert (bars.diff() < 0).all()


def test_cosine_betas_follow_the_curve_they_discretise() -> None:
    bars = torch.cumprod(1 - cosine_betas(1000, 0.0, 0.0), dim=0)
    t = (torch.arange(1, 990) / 1000 + 0.008) / 1.008 * torch.pi / 2
    start = np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    torch.testing.assert_close(bars[:989], t.cos() ** 2 / start, rtol=2e-4, atol=1e-6)


def test_noise_levels_and_timesteps_are_inverse_to_each_other() -> None:
    timesteps = np.array([999, 700.0, 13.0, 1.0, 0.0])
    levels = schedules.timesteps_to_sigmas(timesteps, table())
    np.testing.assert_allclose(schedules.sigmas_to_timesteps(levels, table()), timesteps, atol=1e-3)


def test_noise_levels_beyond_the_table_are_its_ends() -> None:
    np.testing.assert_allclose(schedules.sigmas_to_timesteps(np.array([1e9, 1e-9]), table()), [999, 0])


@pytest.mark.parametrize("make", [schedules.karras_sigmas, schedules.exponential_sigmas, schedules.beta_sigmas])
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_sigma_spacings_descend_from_the_largest_to_the_smallest(make: object, steps: int) -> None:
    levels = make(80.0, 0.002, steps)  # type: ignore[operator]
    assert levels.shape == (steps,)
    assert levels[0] == pytest.approx(80.0)
    assert (np.diff(levels) < 0).all()
    if steps > 1:
        assert levels[-1] == pytest.approx(0.002)


def test_karras_levels_are_equally_spaced_in_their_seventh_root() -> None:
    roots = schedules.karras_sigmas(80.0, 0.002, 9) ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0])


def test_beta_quantiles_invert_the_distribution_function() -> None:
    x = schedules.beta_quantiles(np.array([0.0, 0.1, 0.5, 0.9, 1.0]), 0.6, 0.6)
    assert (x[0], x[-1]) == (0.0, 1.0)
    assert x[2] == pytest.approx(0.5, abs=1e-12)
    assert x[1] + x[3] == pytest.approx(1.0, abs=1e-12)
    # Beta(1/2, 1/2) has a closed form: sin²(pi p / 2); Beta(1, 1) is uniform.
    p = np.linspace(0, 1, 11)
    np.testing.assert_allclose(schedules.beta_quantiles(p, 0.5, 0.5), np.sin(np.pi * p / 2) ** 2, atol=1e-12)
    np.testing.assert_allclose(schedules.beta_quantiles(p, 1.0, 1.0), p, atol=1e-12)
    # Beta(a, 1) has the distribution function x^a.
    np.testing.assert_allclose(schedules.beta_quantiles(p, 3.0, 1.0), p ** (1 / 3), atol=1e-12)
    np.testing.assert_allclose(schedules.beta_quantiles(p, 1.0, 3.0), 1 - (1 - p) ** (1 / 3), atol=1e-12)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("skip", [False, True])
def test_every_spacing_gives_as_many_descending_timesteps_as_asked(spacing: str, skip: bool) -> None:
    for steps in (1, 2, 20, 61, 103, 499):
        timesteps = schedules.spaced_timesteps(spacing, steps, 1000, skip_lowest=skip)
        assert len(timesteps) == steps
        assert timesteps.min() >= 0
        assert timesteps.max() < 1000
        assert (np.diff(timesteps) < 0).all()


def test_spacings_are_those_of_the_paper() -> None:
    """Table 2 of arXiv 2305.08891, ten steps, counted from 0."""
    assert schedules.spaced_timesteps("linspace", 10, 1000).tolist() == [
        999, 888, 777, 666, 555, 444, 333, 222, 111, 0
    ]  # fmt: skip
    assert schedules.spaced_timesteps("leading", 10, 1000, 1).tolist() == list(range(901, 0, -100))
    assert schedules.spaced_timesteps("trailing", 10, 1000).tolist() == list(range(999, 0, -100))


def test_leading_cannot_make_more_steps_than_there_are_timesteps() -> None:
    with pytest.raises(InputError, match="at most 9"):
        schedules.spaced_timesteps("leading", 10, 10, skip_lowest=True)
    with pytest.raises(InputError, match="steps_offset=1"):
        schedules.spaced_timesteps("leading", 10, 10, 1)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([], "one or more"),
        ([[1, 2]], "one or more"),
        ([100, 200], "descending"),
        ([100, 100], "descending"),
        ([1000, 5], "between 0 and 999"),
        ([5, -1], "between 0 and 999"),
        ([float("nan")], "between 0 and 999"),
        ([10.5, 3], "whole numbers"),
    ],
)
def test_custom_timesteps_are_checked(timesteps: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        schedules.custom_timesteps(timesteps, 1000, whole=True)


def test_levels_find_their_timesteps_in_a_table_that_falls_at_its_end() -> None:
    falling = np.array([0.1, 1.0, 100.0, 50.0])  # with rescale_betas_zero_snr, rounding can do that
    found = schedules.sigmas_to_timesteps(np.array([60.0, 10.0, 1.0, 0.05]), falling)
    between = 2 + np.log(100 / 60) / np.log(2)  # of the last level that is not above, and the one before
    np.testing.assert_allclose(found, [between, 1.5, 1.0, 0.0])
