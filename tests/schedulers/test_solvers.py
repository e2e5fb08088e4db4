"""Properties of each solver that do not need a reference: exactness, order of convergence, custom schedules, errors."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

import pytest
import torch

from impasto.errors import ConfigurationError, InputError
from impasto.schedulers.ddim import DDIMScheduler
from impasto.schedulers.ddpm import DDPMScheduler
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler
from impasto.schedulers.lcm import LCMScheduler

#: The toy data: independent normal numbers of this standard deviation, whose best predictions are known.
DATA_STD = 0.5


def best_original(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """E[x_0 | x_t] for the toy data."""
    return alpha * DATA_STD**2 / (alpha**2 * DATA_STD**2 + sigma**2) * x


def prediction(x: torch.Tensor, ratio: float, kind: str = "epsilon") -> torch.Tensor:
    alpha = 1 / math.sqrt(ratio**2 + 1)
    original = best_original(x, alpha, ratio * alpha)
    return original if kind == "sample" else (x - alpha * original) / (ratio * alpha)


def solve(scheduler: DPMSolverMultistepScheduler, x: torch.Tensor, **step: Any) -> torch.Tensor:
    """Follow the toy's ODE (or SDE) with the exact model at each step's own noise level."""
    for index, t in enumerate(scheduler.timesteps):
        output = prediction(x, float(scheduler.sigmas[index]), scheduler.config.prediction_type)
        x = scheduler.step(output, t, x, **step).prev_sample
    return x


def marginal_std(ratio: float) -> float:
    alpha = 1 / math.sqrt(ratio**2 + 1)
    return alpha * math.sqrt(DATA_STD**2 + ratio**2)


def ode_error(steps: int, **options: Any) -> float:
    """How far the solver is from the toy ODE's exact solution: x keeps its quantile of the marginal."""
    scheduler = DPMSolverMultistepScheduler(
        use_exponential_sigmas=True, final_sigmas_type="sigma_min", lower_order_final=False, **options
    )
    scheduler.set_timesteps(steps)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    exact = marginal_std(float(scheduler.sigmas[-1])) / marginal_std(float(scheduler.sigmas[0]))
    return abs(float(solve(scheduler, x)) - exact) / exact


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize(("order", "solver"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")])
def test_halving_the_step_gains_as_many_binary_digits_as_the_order(algorithm: str, order: int, solver: str) -> None:
    options = {"algorithm_type": algorithm, "solver_order": order, "solver_type": solver}
    coarse, fine = (ode_error(steps, **options) for steps in (40, 80))
    assert fine < 5e-2
    assert math.log2(coarse / fine) > min(order, 2) - 0.35  # the first step is of first order: beyond 2 it decides


def test_higher_orders_are_nearer() -> None:
    first, second, third = (ode_error(20, solver_order=order) for order in (1, 2, 3))
    assert third < second < first / 4


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_model_that_knows_the_original_ends_there(algorithm: str, order: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type=algorithm, solver_order=order, prediction_type="sample", use_karras_sigmas=True
    )
    scheduler.set_timesteps(9)
    original, x = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    for t in scheduler.timesteps:
        x = scheduler.step(original, t, x).prev_sample
    torch.testing.assert_close(x, original)


@pytest.mark.parametrize("algorithm", ["sde-dpmsolver++", "sde-dpmsolver"])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_stochastic_solvers_reproduce_the_spread_of_the_data(algorithm: str, solver: str) -> None:
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type=algorithm, solver_type=solver, final_sigmas_type="sigma_min", use_exponential_sigmas=True
    )
    scheduler.set_timesteps(150)
    x = torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    x = solve(scheduler, x, generator=torch.Generator().manual_seed(1))
    assert float(x.std()) == pytest.approx(DATA_STD, rel=0.03)


@pytest.mark.parametrize(
    ("scheduler", "step", "kind"),
    [
        (DDIMScheduler(clip_sample=False), {}, "deterministic"),
        (DDIMScheduler(clip_sample=False), {"eta": 1.0}, "random"),
        (DDPMScheduler(clip_sample=False), {}, "random"),
    ],
)
def test_ddim_and_ddpm_reproduce_the_spread_of_the_data(scheduler: Any, step: Any, kind: str) -> None:
    scheduler.set_timesteps(200)
    x = start = torch.randn(1, 1, 150, 150, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        bar = float(scheduler.alphas_cumprod[t])
        x = scheduler.step(prediction(x, math.sqrt((1 - bar) / bar)), t, x, generator=generator, **step).prev_sample
    assert float(x.std()) == pytest.approx(DATA_STD, rel=0.05)
    correlation = float(torch.corrcoef(torch.stack([start.flatten(), x.flatten()]))[0, 1])
    assert correlation > 0.999 if kind == "deterministic" else correlation < 0.5


# --- DPM-Solver: schedules ---


def run(scheduler: DPMSolverMultistepScheduler, x: torch.Tensor) -> torch.Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(x + t / 1000), t, x).prev_sample
    return x


@pytest.mark.parametrize("ending", [[], [0.0]])
def test_custom_sigmas_give_what_the_same_levels_give_by_option(ending: list[float]) -> None:
    by_option = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    by_option.set_timesteps(12)
    by_list = DPMSolverMultistepScheduler()
    by_list.set_timesteps(sigmas=by_option.sigmas[:-1].tolist() + ending)
    assert torch.equal(by_list.sigmas, by_option.sigmas)
    assert torch.equal(by_list.timesteps, by_option.timesteps)
    assert by_list.num_inference_steps == 12
    x = torch.randn(1, 4, 3, 3)
    assert torch.equal(run(by_list, x), run(by_option, x))


def test_custom_sigmas_of_the_flow_line() -> None:
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=3)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    original, x = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    flow = x - original  # straight: constant along the line from noise to original
    for t in scheduler.timesteps:
        x = scheduler.step(flow, t, x).prev_sample
    torch.testing.assert_close(x, original)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([], "one or more"),
        ([0.0], "one or more"),
        ([1.0, 2.0], "descending"),
        ([2.0, 2.0, 1.0], "descending"),
        ([2.0, -1.0], "above 0"),
        ([math.nan], "above 0"),
        ([math.inf, 1.0], "above 0"),
    ],
)
def test_custom_sigmas_are_checked(sigmas: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DPMSolverMultistepScheduler().set_timesteps(sigmas=sigmas)


def test_custom_sigmas_must_suit_the_solver() -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        DPMSolverMultistepScheduler(use_flow_sigmas=True).set_timesteps(sigmas=[1.5, 0.5])
    with pytest.raises(InputError, match="cannot end in 0"):
        DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min").set_timesteps(
            sigmas=[3.0, 0.0]
        )


@pytest.mark.parametrize(
    "given",
    [
        dict(pair)
        for pair in itertools.combinations(
            [("num_inference_steps", 3), ("timesteps", [900, 500, 100]), ("sigmas", [9.0, 2.0, 0.5])], 2
        )
    ],
)
def test_only_one_way_of_giving_steps(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="exactly one of num_inference_steps, timesteps, sigmas"):
        DPMSolverMultistepScheduler().set_timesteps(**given)


def test_fractional_timesteps_are_kept_and_interpolated() -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(timesteps=[900.5, 500.25, 10.75])
    assert scheduler.timesteps.tolist() == [900.5, 500.25, 10.75]
    levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    assert float(scheduler.sigmas[0]) == pytest.approx(float(levels[900:902].mean()), rel=1e-6)
    assert run(scheduler, torch.randn(1, 4, 3, 3)).isfinite().all()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_repeated_timesteps_change_nothing(order: int, solver: str, algorithm: str) -> None:
    """The reference divides 0 by 0 there, for instance with 1000 steps, whose rounding repeats one timestep."""
    x, noise = torch.randn(1, 4, 3, 3), torch.zeros(1, 4, 3, 3)
    results = []
    for timesteps in ([900, 900, 600, 600, 600, 300], [900, 600, 300]):
        scheduler = DPMSolverMultistepScheduler(
            solver_order=order, solver_type=solver, algorithm_type=algorithm, lower_order_final=False
        )
        scheduler.set_timesteps(timesteps=timesteps)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(torch.full_like(y, 0.3), t, y, variance_noise=noise).prev_sample
        assert scheduler.step_index == len(timesteps)
        results.append(y)
    torch.testing.assert_close(results[0], results[1])


def test_a_thousand_steps_are_finite() -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(1000)
    assert run(scheduler, torch.randn(1, 1, 2, 2)).isfinite().all()


def test_noise_before_set_timesteps_is_that_of_training() -> None:
    """The reference then takes the levels in reverse."""
    original, noise, timesteps = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([3, 500, 990])
    expected = DDPMScheduler().add_noise(original, noise, timesteps)
    torch.testing.assert_close(DPMSolverMultistepScheduler().add_noise(original, noise, timesteps), expected)


def test_noise_at_timesteps_outside_the_schedule_is_that_of_training() -> None:
    """The reference then takes the last level of the schedule."""
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(4)
    original, noise, timesteps = torch.randn(2, 4), torch.randn(2, 4), torch.tensor([3, 501])
    expected = DDPMScheduler().add_noise(original, noise, timesteps)
    torch.testing.assert_close(scheduler.add_noise(original, noise, timesteps), expected)


def test_a_learned_variance_is_left_out_of_four_channels_too() -> None:
    """The reference keeps three channels, whatever the sample has."""
    x, output = torch.randn(1, 4, 3, 3), torch.randn(1, 8, 3, 3)
    results = []
    for variance, given in (("learned_range", output), (None, output[:, :4]), ("learned_range", output[:, :4])):
        scheduler = DPMSolverMultistepScheduler(variance_type=variance)
        scheduler.set_timesteps(3)
        results.append(scheduler.step(given, scheduler.timesteps[0], x).prev_sample)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_dynamic_shifting_has_to_be_on() -> None:
    with pytest.raises(InputError, match="use_dynamic_shifting"):
        DPMSolverMultistepScheduler(use_flow_sigmas=True).set_timesteps(4, mu=0.5)


def test_timesteps_contradict_an_option_that_spaces_levels() -> None:
    with pytest.raises(InputError, match="use_karras_sigmas"):
        DPMSolverMultistepScheduler(use_karras_sigmas=True).set_timesteps(timesteps=[5, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver_order": 4}, "solver_order must be one of 1, 2, 3"),
        ({"algorithm_type": "euler"}, "algorithm_type must be one of 'dpmsolver"),
        ({"solver_type": "ralston"}, "solver_type must be one of 'midpoint', 'heun'"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type must be one of"),
        ({"time_shift_type": "linear"}, "time_shift_type must be one of"),
        ({"algorithm_type": "dpmsolver"}, "final_sigmas_type='sigma_min'"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_beta_sigmas contradict"),
        (
            {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
            "no solver_order=3",
        ),
        (
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "prediction_type": "flow_prediction"},
            "flow_prediction",
        ),
    ],
)
def test_wrong_dpm_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DPMSolverMultistepScheduler(**options)


# --- DDIM, DDPM, LCM ---


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_ddim_wants_eta_between_0_and_1(eta: float) -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(InputError, match="eta must be a finite number of 0 or more and of 1 or less"):
        scheduler.step(torch.zeros(1, 4), scheduler.timesteps[0], torch.zeros(1, 4), eta=eta)


def test_ddim_noise_comes_from_one_place() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 4)
    with pytest.raises(InputError, match="either generator or variance_noise"):
        scheduler.step(x, scheduler.timesteps[0], x, eta=1.0, generator=torch.Generator(), variance_noise=x)


def test_ddpm_fixed_large_log_is_fixed_large() -> None:
    """The reference takes the root of a logarithm: NaN."""
    x = torch.randn(1, 4, 3, 3)
    large, log = (
        DDPMScheduler(variance_type=kind)
        .step(torch.sin(x), 500, x, generator=torch.Generator().manual_seed(0))
        .prev_sample
        for kind in ("fixed_large", "fixed_large_log")
    )
    assert torch.equal(large, log)
    assert large.isfinite().all()


def test_ddpm_says_when_a_learned_variance_is_missing() -> None:
    with pytest.raises(InputError, match="twice the sample's channels"):
        DDPMScheduler(variance_type="learned_range").step(torch.zeros(1, 4, 2, 2), 5, torch.zeros(1, 4, 2, 2))


def test_ddpm_refuses_a_timestep_that_is_not_in_the_schedule() -> None:
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(timesteps=[400])
    with pytest.raises(InputError, match="501 is not in the schedule"):
        scheduler.step(torch.zeros(1, 4, 2, 2), 501, torch.zeros(1, 4, 2, 2))


def test_ddpm_one_step_gives_the_predicted_original_second() -> None:
    scheduler = DDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(timesteps=[400])
    original, noise = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    x = scheduler.add_noise(original, noise, torch.tensor([400]))
    result = scheduler.step(noise, scheduler.timesteps[0], x, return_dict=False)
    torch.testing.assert_close(result[1], original, rtol=1e-4, atol=1e-5)


def test_lcm_adds_no_noise_after_the_last_step_of_a_shortened_schedule() -> None:
    """The reference counts the steps that strength left out, and ends with noise."""
    scheduler = LCMScheduler()
    scheduler.set_timesteps(timesteps=[999, 759, 499, 259], strength=0.5)
    assert scheduler.timesteps.tolist() == [499, 259]
    x = torch.randn(1, 4, 3, 3)
    for t in scheduler.timesteps:
        x, denoised = scheduler.step(torch.sin(x), t, x).to_tuple()
    assert torch.equal(x, denoised)


def test_lcm_is_the_identity_at_timestep_0() -> None:
    scheduler = LCMScheduler()
    scheduler.set_timesteps(timesteps=[0])
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(scheduler.step(torch.randn(1, 4, 3, 3), 0, x).denoised, x)


def test_lcm_warns_of_timesteps_it_was_not_distilled_at(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="impasto"):
        LCMScheduler().set_timesteps(timesteps=[999, 500])
    assert "[500]" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_inference_steps": 51}, "more than the 50 steps"),
        ({"num_inference_steps": 30, "strength": 0.5}, "more than the 25 steps"),
        ({"num_inference_steps": 4, "strength": 0.0}, "strength"),
        ({"num_inference_steps": 4, "original_inference_steps": 2000}, "original_inference_steps"),
        ({"timesteps": [999], "strength": 0.5}, "leaves none"),
    ],
)
def test_lcm_schedules_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LCMScheduler().set_timesteps(**given)
