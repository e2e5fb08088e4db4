"""The names of schedulers that ports of diffusers code read and call: values and signatures against diffusers."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import impasto
from impasto.errors import InputError

NAMES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LCMScheduler",
)
PRIVATE = {"_sigma_to_alpha_sigma_t", "_sigma_to_t", "_threshold_sample", "_init_step_index", "_get_variance"}


def pair(name: str, **options: Any) -> tuple[Any, Any]:
    return getattr(impasto, name)(**options), getattr(diffusers, name)(**options)


def close(ours: Any, theirs: Any) -> None:
    found, expected = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there(name: str) -> None:
    ours, theirs = pair(name)
    for mine, reference in ((ours, theirs), (type(ours), type(theirs))):
        named = {found for found in dir(reference) if not found.startswith("_") or found in PRIVATE} - {"push_to_hub"}
        assert named - set(dir(mine)) == set()


@pytest.mark.parametrize("name", NAMES)
def test_methods_take_the_positions_of_diffusers(name: str) -> None:
    ours, theirs = pair(name)
    for method in dir(theirs):
        if (method.startswith("_") and method not in PRIVATE) or not inspect.ismethod(getattr(theirs, method)):
            continue
        if method in ("push_to_hub", "get_config_dict"):  # the second takes all that load_config takes
            continue
        positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
        found, expected = (
            [p.name for p in inspect.signature(getattr(each, method)).parameters.values() if p.kind is positional]
            for each in (ours, theirs)
        )
        assert found[: len(expected)] == expected, method


@pytest.mark.parametrize("name", NAMES)
def test_compatible_classes(name: str) -> None:
    ours, theirs = pair(name)
    assert ours.has_compatibles is type(ours).has_compatibles is theirs.has_compatibles is True
    names = {cls.__name__ for cls in ours.compatibles}
    assert names == {cls.__name__ for cls in theirs.compatibles} & set(NAMES)
    assert all(getattr(impasto, found) in ours.compatibles for found in names)


@pytest.mark.parametrize("name", NAMES)
def test_values_of_the_config_are_attributes(name: str) -> None:
    ours, theirs = pair(name, num_train_timesteps=500)
    assert ours.num_train_timesteps == theirs.num_train_timesteps == 500
    with pytest.raises(AttributeError, match=f"'{name}' object has no attribute 'colour'"):
        ours.colour  # noqa: B018
    assert copy.deepcopy(ours).num_train_timesteps == 500


@pytest.mark.parametrize("name", ["DDPMScheduler", "LCMScheduler"])
def test_previous_and_custom_timesteps(name: str) -> None:
    ours, theirs = pair(name)
    assert ours.previous_timestep(500) == theirs.previous_timestep(500) == 499
    for schedule, custom in (({"num_inference_steps": 5}, False), ({"timesteps": [999, 499, 19]}, True)):
        for each in (ours, theirs):
            each.set_timesteps(**schedule)
        assert ours.custom_timesteps == theirs.custom_timesteps == custom
        found = [(ours.previous_timestep(t), int(theirs.previous_timestep(t))) for t in theirs.timesteps]
        assert all(a == b for a, b in found)
        assert found[-1] == (-1, -1)
    with pytest.raises(InputError, match="timestep 998 is not in the schedule"):
        ours.previous_timestep(998)
    ours.set_timesteps(5)
    assert ours.custom_timesteps is False


@pytest.mark.parametrize("name", NAMES[:3] + NAMES[4:])
def test_thresholding(name: str) -> None:
    ours, theirs = pair(name, dynamic_thresholding_ratio=0.8, sample_max_value=1.5)
    sample = 2 * torch.randn(3, 4, 5, 5)
    close(ours._threshold_sample(sample), theirs._threshold_sample(sample))


def test_variance_of_ddim() -> None:
    for options in ({}, {"set_alpha_to_one": False}):
        ours, theirs = pair("DDIMScheduler", **options)
        for step in ((999, 899), (500, 480), (19, -1)):
            close(ours._get_variance(*step), theirs._get_variance(*step))


@pytest.mark.parametrize(
    "kind", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
)
def test_variance_of_ddpm(kind: str) -> None:
    ours, theirs = pair("DDPMScheduler", variance_type=kind)
    assert torch.equal(ours.one, theirs.one)
    predicted = torch.randn(2, 3)
    for each in (ours, theirs):
        each.set_timesteps(10)
    for t in (900, 300, 0):
        close(ours._get_variance(t, predicted), theirs._get_variance(t, predicted))
    close(ours._get_variance(900, variance_type="fixed_large"), theirs._get_variance(900, variance_type="fixed_large"))


def test_boundary_condition_of_lcm() -> None:
    for options in ({}, {"set_alpha_to_one": False, "timestep_scaling": 3.0}):
        ours, theirs = pair("LCMScheduler", **options)
        close(ours.final_alpha_cumprod, theirs.final_alpha_cumprod)
        for t in (0, 1, 499, torch.tensor(999)):
            for found, expected in zip(
                ours.get_scalings_for_boundary_condition_discrete(t),
                theirs.get_scalings_for_boundary_condition_discrete(t),
                strict=True,
            ):
                close(found, expected)
        assert ours.sigma_data == theirs.sigma_data


@pytest.mark.parametrize("name", NAMES[2:])
def test_indices_of_timesteps(name: str) -> None:
    ours, theirs = pair(name)
    for each in (ours, theirs):
        each.set_timesteps(4)
    for t in theirs.timesteps:
        assert ours.index_for_timestep(t) == theirs.index_for_timestep(t)
        assert ours.index_for_timestep(t.item()) == theirs.index_for_timestep(t)
    doubled = torch.tensor([900.0, 700.0, 700.0, 100.0])
    for t in (900.0, 700.0, 100.0):
        assert ours.index_for_timestep(t, doubled) == theirs.index_for_timestep(t, doubled)
    assert ours.index_for_timestep(700, doubled) == 2
    if name.startswith("DPM"):
        assert ours.index_for_timestep(5) == theirs.index_for_timestep(5) == 3
    else:
        with pytest.raises(InputError, match="timestep 5 is not in the schedule"):
            ours.index_for_timestep(5)
    for each in (ours, theirs):
        each._init_step_index(each.timesteps[2])
    assert ours.step_index == theirs.step_index == 2
    for each in (ours, theirs):
        each.set_begin_index(1)
        each._init_step_index(each.timesteps[2])
    assert ours.step_index == theirs.step_index == 1


def test_shifts_of_flow_matching() -> None:
    t = torch.linspace(0.1, 1, 7)
    for kind in ("exponential", "linear"):
        ours, theirs = pair("FlowMatchEulerDiscreteScheduler", time_shift_type=kind, shift_terminal=0.2)
        for sigma in (1.0, 0.5):
            close(ours.time_shift(0.8, sigma, t), theirs.time_shift(0.8, sigma, t))
            close(ours.time_shift(0.8, sigma, t.numpy()), theirs.time_shift(0.8, sigma, t.numpy()))
            close(ours._time_shift_linear(0.8, sigma, t), theirs._time_shift_linear(0.8, sigma, t))
            close(ours._time_shift_exponential(0.8, sigma, t), theirs._time_shift_exponential(0.8, sigma, t))
        close(ours.stretch_shift_to_terminal(t.flip(0)), theirs.stretch_shift_to_terminal(t.flip(0)))
        assert ours._sigma_to_t(0.5) == theirs._sigma_to_t(0.5) == 500
    with pytest.raises(InputError, match="needs a scheduler with shift_terminal"):
        impasto.FlowMatchEulerDiscreteScheduler().stretch_shift_to_terminal(t)


@pytest.mark.parametrize("name", NAMES[2:4])
def test_spacings_of_noise_levels(name: str) -> None:
    ours, theirs = pair(name)
    levels = torch.linspace(0.9, 0.1, 6)
    close(ours._convert_to_karras(levels, 4), theirs._convert_to_karras(levels, 4))
    close(ours._convert_to_exponential(levels, 4), theirs._convert_to_exponential(levels, 4))
    for shape in ((), (0.6, 0.6), (0.5, 2.0), (5.0, 1.5)):
        close(ours._convert_to_beta(levels, 9, *shape), theirs._convert_to_beta(levels, 9, *shape))
    close(ours._convert_to_beta(levels, 9, beta=3.0), theirs._convert_to_beta(levels, 9, beta=3.0))


def test_lu_spacing() -> None:
    ours, theirs = pair("DPMSolverMultistepScheduler")
    for levels in (torch.linspace(0.9, 0.1, 6), torch.linspace(-4.0, 5.0, 6)):
        close(ours._convert_to_lu(levels, 7), theirs._convert_to_lu(levels, 7))


# --- DPM-Solver ---

SOLVERS: list[dict[str, Any]] = [
    {"solver_order": order, "algorithm_type": algorithm, "solver_type": kind, "final_sigmas_type": "sigma_min"}
    for algorithm in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
    for order in (2, 3)
    for kind in ("midpoint", "heun")
    if not (order == 3 and algorithm == "sde-dpmsolver")
]


def test_tables_of_dpm_solver() -> None:
    for options in ({}, {"rescale_betas_zero_snr": True}, {"beta_schedule": "squaredcos_cap_v2"}):
        ours, theirs = pair("DPMSolverMultistepScheduler", **options)
        for table in ("alpha_t", "sigma_t", "lambda_t"):
            close(getattr(ours, table), getattr(theirs, table))
        assert ours.model_outputs == theirs.model_outputs == [None, None]
        assert ours.lower_order_nums == theirs.lower_order_nums == 0


def test_conversions_of_noise_levels() -> None:
    for options in ({}, {"use_flow_sigmas": True}):
        ours, theirs = pair("DPMSolverMultistepScheduler", **options)
        for found, expected in zip(
            ours._sigma_to_alpha_sigma_t(torch.tensor(0.7)),
            theirs._sigma_to_alpha_sigma_t(torch.tensor(0.7)),
            strict=True,
        ):
            close(found, expected)
        levels, table = np.array([9.0, 2.0, 0.3]), np.log(theirs._table if hasattr(theirs, "_table") else ours._table)
        close(ours._sigma_to_t(levels, table), theirs._sigma_to_t(levels, table))


@pytest.mark.parametrize("options", SOLVERS, ids=lambda options: "-".join(map(str, options.values())))
def test_outputs_and_updates_of_dpm_solver(options: dict[str, Any]) -> None:
    """Before each step, every update from the outputs so far; after it, the outputs."""
    ours, theirs = pair("DPMSolverMultistepScheduler", **options)
    for each in (ours, theirs):
        each.set_timesteps(8)
        each.set_begin_index(0)
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    for t in theirs.timesteps[:6]:
        output = torch.sin(x + t / 1000)
        for each in (ours, theirs):
            each._init_step_index(t) if each.step_index is None else None
        converted = [each.convert_model_output(output, sample=x) for each in (ours, theirs)]
        close(*converted)
        close(ours.convert_model_output(output, t, x), converted[1])
        close(*(each.dpm_solver_first_order_update(converted[1], sample=x, noise=noise) for each in (ours, theirs)))
        present = [one for one in theirs.model_outputs[1:] if one is not None] + [converted[1]]
        if len(present) > 1:
            close(
                *(
                    each.multistep_dpm_solver_second_order_update(present, sample=x, noise=noise)
                    for each in (ours, theirs)
                )
            )
        if len(present) > 2:
            close(
                *(
                    each.multistep_dpm_solver_third_order_update(present, sample=x, noise=noise)
                    for each in (ours, theirs)
                )
            )
        results = [each.step(output, t, x, variance_noise=noise).prev_sample for each in (ours, theirs)]
        close(*results)
        assert ours.lower_order_nums == theirs.lower_order_nums
        for found, expected in zip(ours.model_outputs, theirs.model_outputs, strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                close(found, expected)
        x = results[1]


def test_outputs_of_dpm_solver_can_be_replaced() -> None:
    x = torch.randn(1, 3, 4, 4)
    schedulers = pair("DPMSolverMultistepScheduler")
    for each in schedulers:
        each.set_timesteps(8)
        for t in each.timesteps[:3]:
            each.step(torch.sin(x), t, x)
        each.model_outputs = [output * 0.5 for output in each.model_outputs]
    ours, theirs = schedulers
    t = ours.timesteps[3]
    close(ours.step(torch.sin(x), t, x).prev_sample, theirs.step(torch.sin(x), t, x).prev_sample)
    for each in schedulers:
        each.model_outputs, each.lower_order_nums = [None, None], 0
    t = ours.timesteps[4]
    close(ours.step(torch.sin(x), t, x).prev_sample, theirs.step(torch.sin(x), t, x).prev_sample)
    ours.lower_order_nums = 0
    assert ours.model_outputs == [None, None]


@pytest.mark.parametrize("begin", [False, True], ids=["by timestep", "by index"])
def test_outputs_of_dpm_solver_can_be_given_before_the_first_step(begin: bool) -> None:
    """As ports do that continue a saved run: their noise levels are those of the steps before the first one."""
    x, outputs = torch.randn(1, 3, 4, 4), [torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)]
    schedulers = pair("DPMSolverMultistepScheduler", solver_order=3)
    for each in schedulers:
        each.set_timesteps(20)
        if begin:
            each.set_begin_index(5)
        each.model_outputs, each.lower_order_nums = [None, *outputs], 2
    ours, theirs = schedulers
    assert ours.lower_order_nums == 2
    for t in ours.timesteps[5:8]:
        close(ours.step(torch.sin(x), t, x).prev_sample, theirs.step(torch.sin(x), t, x).prev_sample)


def test_outputs_from_before_the_schedule_are_left_out() -> None:
    x, ours = torch.randn(1, 3, 4, 4), impasto.DPMSolverMultistepScheduler()
    ours.set_timesteps(8)
    expected = ours.step(torch.sin(x), ours.timesteps[0], x).prev_sample
    ours.set_timesteps(8)
    ours.model_outputs = [x, x]
    assert torch.equal(ours.step(torch.sin(x), ours.timesteps[0], x).prev_sample, expected)


def test_what_updates_need() -> None:
    scheduler = impasto.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(InputError, match="give sample, a tensor"):
        scheduler.convert_model_output(x, 5)
    with pytest.raises(InputError, match="unknown argument 'smaple'"):
        scheduler.dpm_solver_first_order_update(x, smaple=x)
    with pytest.raises(InputError, match=r"algorithm_type='sde-dpmsolver\+\+' needs noise"):
        scheduler.dpm_solver_first_order_update(x, sample=x)
