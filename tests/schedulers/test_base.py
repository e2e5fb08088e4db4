"""What all schedulers share: configs, files, generators, timesteps on a device, errors."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from impasto.errors import CheckpointNotFoundError, ConfigurationError, InputError
from impasto.schedulers.ddim import DDIMScheduler
from impasto.schedulers.ddpm import DDPMScheduler
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler
from impasto.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
from impasto.schedulers.lcm import LCMScheduler

CLASSES: list[Any] = [DPMSolverMultistepScheduler, DDIMScheduler, DDPMScheduler, LCMScheduler]
STOCHASTIC: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    (DDIMScheduler, {}, {"eta": 1.0}),
    (DDPMScheduler, {}, {}),
    (LCMScheduler, {}, {}),
]


def sample(cls: Any, options: dict[str, Any], step: dict[str, Any], x: torch.Tensor, generator: Any) -> torch.Tensor:
    scheduler = cls(**options)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(x + t / 1000), t, x, generator=generator, **step).prev_sample
    return x


@pytest.mark.parametrize(("cls", "options", "step"), STOCHASTIC)
def test_a_generator_for_each_sample_makes_it_independent_of_its_batch(cls: Any, options: Any, step: Any) -> None:
    x = torch.randn(3, 4, 4, 4)
    together = sample(cls, options, step, x, [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    alone = sample(cls, options, step, x[1:2], torch.Generator().manual_seed(6))
    torch.testing.assert_close(together[1:2], alone)
    other = sample(cls, options, step, x[1:2], torch.Generator().manual_seed(8))
    assert not torch.allclose(alone, other, atol=1e-2)


@pytest.mark.parametrize(("cls", "options", "step"), STOCHASTIC)
def test_a_wrong_number_of_generators_is_refused(cls: Any, options: Any, step: Any) -> None:
    with pytest.raises(InputError, match="2 generators were given for 3 images"):
        sample(cls, options, step, torch.randn(3, 4, 4, 4), [torch.Generator(), torch.Generator()])


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_steps_keep_the_dtype_and_compute_in_float32_at_least(cls: Any, dtype: torch.dtype) -> None:
    x, output = torch.randn(2, 4, 4, 4, dtype=dtype), torch.randn(2, 4, 4, 4, dtype=dtype)
    results = []
    for kind in (dtype, torch.float32):
        scheduler = cls()
        scheduler.set_timesteps(1)
        t = scheduler.timesteps[0]
        results.append(scheduler.step(output.to(kind), t, x.to(kind), return_dict=False)[-1])  # no noise in it
    assert results[0].dtype == dtype
    expected = results[1] if dtype == torch.float64 else results[1].to(dtype)
    torch.testing.assert_close(results[0].to(expected.dtype), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_timestep_may_be_a_view_a_copy_or_a_number(cls: Any) -> None:
    x = torch.randn(1, 4, 4, 4)
    results = []
    for take in (lambda t: t, lambda t: t.clone(), int):
        scheduler = cls()
        scheduler.set_timesteps(5)
        assert len(scheduler.timesteps) == scheduler.num_inference_steps == 5
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(torch.sin(y), take(t), y, generator=torch.Generator().manual_seed(0)).prev_sample
        results.append(y)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("cls", CLASSES)
def test_outputs_are_read_by_name_key_and_index(cls: Any) -> None:
    scheduler = cls()
    scheduler.set_timesteps(1)
    output = scheduler.step(torch.zeros(1, 4, 2, 2), scheduler.timesteps[0], torch.ones(1, 4, 2, 2))
    assert output.prev_sample is output["prev_sample"] is output[0]
    first, *_ = output.to_tuple()
    assert first is output.prev_sample


@pytest.mark.parametrize("cls", CLASSES)
def test_schedulers_can_be_copied_and_pickled_in_the_middle(cls: Any) -> None:
    scheduler = cls()
    scheduler.set_timesteps(4)
    x = torch.randn(1, 4, 2, 2)
    t, u = scheduler.timesteps[:2]
    y = scheduler.step(x, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    copies = [copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))]
    expected = scheduler.step(y, u, y, generator=torch.Generator().manual_seed(0)).prev_sample
    for each in copies:
        assert torch.equal(each.step(y, u, y, generator=torch.Generator().manual_seed(0)).prev_sample, expected)


@pytest.mark.parametrize("cls", CLASSES)
def test_add_noise_keeps_half_precision_apart_from_zero(cls: Any) -> None:
    """1 - alphas_cumprod of the first timestep is 1e-4 to 9e-4: lost when subtracted in bfloat16."""
    scheduler = cls()
    noisy = scheduler.add_noise(
        torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.tensor([0])
    )
    assert noisy.dtype == torch.bfloat16
    assert noisy.item() == pytest.approx(math.sqrt(float(scheduler.betas[0])), rel=1e-2)


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler, LCMScheduler])
@pytest.mark.parametrize("timesteps", [torch.tensor([1000]), torch.tensor([-1]), torch.tensor([3.5])])
def test_add_noise_refuses_timesteps_that_do_not_exist(cls: Any, timesteps: torch.Tensor) -> None:
    with pytest.raises(InputError, match="timesteps must"):
        cls().add_noise(torch.zeros(1, 4), torch.zeros(1, 4), timesteps)


# --- configs and files ---


def test_the_published_config_loads_with_its_infinity(tmp_path: Path) -> None:
    config = {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": "0.22.0.dev0",
        "algorithm_type": "dpmsolver++",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "lambda_min_clipped": -math.inf,
        "solver_order": 2,
        "thresholding": False,
        "trained_betas": None,
        "variance_type": None,
        "clip_sample_range": 1.0,
    }
    (tmp_path / "scheduler").mkdir()
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(config))
    assert "-Infinity" in path.read_text()
    scheduler = DPMSolverMultistepScheduler.from_pretrained(tmp_path, subfolder="scheduler", solver_order=3)
    assert scheduler.config.lambda_min_clipped == -math.inf
    assert scheduler.config.solver_order == 3
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == 999
    assert scheduler.sigmas[-1] == 0


def test_a_folder_without_a_scheduler_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"scheduler_config\.json"):
        DDIMScheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_array_of_betas_survives_saving(cls: Any, tmp_path: Path) -> None:
    options = {"original_inference_steps": 5} if cls is LCMScheduler else {}
    scheduler = cls(trained_betas=np.linspace(0.01, 0.02, 10), num_train_timesteps=10, **options)
    scheduler.save_pretrained(tmp_path)
    assert torch.equal(cls.from_pretrained(tmp_path).betas, scheduler.betas)


def test_keywords_of_loading(tmp_path: Path) -> None:
    DDIMScheduler(500).save_pretrained(tmp_path / "scheduler")
    harmless: dict[str, Any] = {"force_download": True, "proxies": None, "mirror": "x", "output_loading_info": True}
    loaded = DDIMScheduler.from_pretrained(tmp_path, "scheduler", revision="main", token="t", beta_end=0.05, **harmless)
    assert (loaded.config.num_train_timesteps, loaded.config.beta_end) == (500, 0.05)
    with pytest.raises(InputError, match=r"DDIMScheduler has no argument 'subfoldr'; did you mean 'subfolder'\?"):
        DDIMScheduler.from_pretrained(tmp_path, subfoldr="scheduler")
    with pytest.raises(InputError, match=r"DDIMScheduler has no argument 'beta_edn'; did you mean 'beta_end'\?"):
        DDIMScheduler.from_pretrained(tmp_path / "scheduler", beta_edn=0.5)
    with pytest.raises(InputError, match=r"proxies=.*HTTPS_PROXY"):
        DDIMScheduler.from_pretrained(tmp_path, "scheduler", True, proxies={"https": "x"})


def test_uploading_a_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("impasto.checkpoints.upload._upload", lambda folder, files, *options: calls.append(options))
    DDIMScheduler().push_to_hub("me/ddim", variant="fp16", private=True)
    assert calls == [("me/ddim", "Upload scheduler", True, None, False, None)]


def test_a_misspelt_key_of_a_config_is_named(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = DPMSolverMultistepScheduler.from_config({"solver_oder": 3, "skip_prk_steps": True})
    assert [record.getMessage() for record in caplog.records] == [
        "DPMSolverMultistepScheduler: unknown config values are ignored: solver_oder"
    ]
    assert scheduler.config.skip_prk_steps is True


def test_from_config_wants_a_config() -> None:
    with pytest.raises(ConfigurationError, match=r"scheduler\.config"):
        DDIMScheduler.from_config(DDIMScheduler())  # type: ignore[arg-type]


def test_an_override_that_is_no_argument_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="solver_oder"):
        DPMSolverMultistepScheduler.from_config({}, solver_oder=2)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "quadratic"}, "beta_schedule must be one of 'linear', 'scaled_linear'"),
        ({"prediction_type": "x0"}, "prediction_type must be one of 'epsilon'"),
        ({"timestep_spacing": "even"}, "timestep_spacing must be one of 'linspace'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"trained_betas": [0.1, 0.2]}, "num_train_timesteps=1000"),
        ({"beta_end": 1.5}, "beta_end must be a finite number of 0 or more and of 1 or less"),
        ({"beta_start": math.nan}, "beta_start must be a finite number of 0 or more and of 1 or less"),
    ],
)
def test_wrong_options_are_named_with_what_is_allowed(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        cls(**options)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, "20"])
def test_a_number_of_steps_that_cannot_be_is_refused(cls: Any, steps: Any) -> None:
    with pytest.raises(InputError, match="num_inference_steps must be a whole number from 1 to 1000"):
        cls().set_timesteps(steps)


@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, DDPMScheduler, LCMScheduler])
def test_steps_are_given_in_exactly_one_way(cls: Any) -> None:
    for given in ({}, {"num_inference_steps": 2, "timesteps": [5, 1]}):
        with pytest.raises(InputError, match="exactly one of num_inference_steps, timesteps"):
            cls().set_timesteps(**given)
    with pytest.raises(InputError, match="descending"):
        cls().set_timesteps(timesteps=[1, 5])


@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, DDIMScheduler, LCMScheduler])
def test_a_step_needs_a_schedule(cls: Any) -> None:
    with pytest.raises(InputError, match="call set_timesteps"):
        cls().step(torch.zeros(1, 4), 5, torch.zeros(1, 4))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_step_wants_shapes_that_fit_and_one_timestep(cls: Any) -> None:
    scheduler = cls()
    scheduler.set_timesteps(2)
    t = scheduler.timesteps[0]
    with pytest.raises(InputError, match=r"\(1, 8, 2, 2\)"):
        scheduler.step(torch.zeros(1, 8, 2, 2), t, torch.zeros(1, 4, 2, 2))
    scheduler.set_timesteps(2)
    with pytest.raises(InputError, match="one timestep"):
        scheduler.step(torch.zeros(1, 4, 2, 2), scheduler.timesteps, torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_timestep_that_is_not_there_is_refused(cls: Any) -> None:
    scheduler = cls()
    scheduler.set_timesteps(2)
    with pytest.raises(InputError, match="timestep"):
        scheduler.step(torch.zeros(1, 4, 2, 2), 5000, torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, LCMScheduler])
def test_a_step_after_the_last_is_refused(cls: Any) -> None:
    scheduler = cls()
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 4, 2, 2)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    assert scheduler.step_index == 2
    with pytest.raises(InputError, match="all 2 steps"):
        scheduler.step(x, 0, x)


@pytest.mark.gpu
@pytest.mark.parametrize("cls", CLASSES)
def test_steps_never_wait_for_the_device(cls: Any) -> None:
    scheduler = cls()
    scheduler.set_timesteps(5, device="cuda")
    x = torch.randn(1, 4, 8, 8, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in scheduler.timesteps:
            x = scheduler.step(torch.sin(x), t, x, return_dict=False)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"}),
        (DPMSolverMultistepScheduler, {"lambda_min_clipped": -1.0}),
        (DDIMScheduler, {"set_alpha_to_one": False}),
        (DDPMScheduler, {"variance_type": "fixed_large"}),
        (FlowMatchEulerDiscreteScheduler, {"use_karras_sigmas": True, "shift": 3.0}),
    ],
)
def test_registered_arguments_rebuild_the_scheduler(cls: Any, values: dict[str, Any]) -> None:
    scheduler, expected = cls(num_train_timesteps=500), cls(num_train_timesteps=500, **values)
    scheduler.set_timesteps(4)
    scheduler.register_to_config(note="kept")
    scheduler.set_timesteps(4)
    step = scheduler.step = scheduler.step  # a function that someone has assigned stays
    scheduler.register_to_config(**values, origin="here")
    assert scheduler.config == {**expected.config, "note": "kept", "origin": "here"}
    assert scheduler.num_inference_steps is None
    assert scheduler.step is step
    x, results = torch.linspace(-1, 1, 16).view(1, 1, 4, 4), []
    for one in (scheduler, expected):
        one.set_timesteps(4)
        results.append(one.step(x, one.timesteps[1], x, generator=torch.Generator().manual_seed(0)).prev_sample)
    assert torch.equal(scheduler.timesteps, expected.timesteps)
    assert torch.equal(*results)


def test_a_refused_value_leaves_the_scheduler_as_it_was() -> None:
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(4)
    before = dict(scheduler.config)
    with pytest.raises(ConfigurationError, match="solver_order"):
        scheduler.register_to_config(use_karras_sigmas=True, solver_order=7)
    assert (scheduler.config, scheduler.num_inference_steps) == (before, 4)
