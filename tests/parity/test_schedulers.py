"""Every option of every scheduler, step by step against diffusers with a fixed fake model."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from impasto.schedulers.ddim import DDIMScheduler
from impasto.schedulers.ddpm import DDPMScheduler
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler
from impasto.schedulers.lcm import LCMScheduler

CLASSES = [DPMSolverMultistepScheduler, DDIMScheduler, DDPMScheduler, LCMScheduler]
SHAPE = (2, 3, 4, 4)


def reference_of(ours: type) -> Any:
    return getattr(diffusers, ours.__name__)


def fake_model(sample: torch.Tensor, timestep: Any, channels: int = 3) -> torch.Tensor:
    output = torch.sin(
        1.3 * sample + float(timestep) / 1000 * torch.linspace(1, 2, sample[0].numel()).view_as(sample[0])
    )
    return output if channels == 3 else torch.cat([output, torch.cos(2 * sample)], dim=1)


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    assert ours.shape == reference.shape
    assert ours.dtype == reference.dtype
    assert reference.isfinite().all()
    return float((ours - reference).abs().max() / reference.abs().max())


def compare(
    ours_class: type,
    options: dict[str, Any],
    schedule: dict[str, Any],
    step: dict[str, Any] | None = None,
    channels: int = 3,
    reference_breaks: bool = False,
) -> None:
    """Run both over the whole schedule, step by step from the same sample, with noise of one seed.

    Args:
        reference_breaks: the reference may end in NaN, and ours may not.
    """
    ours, reference = ours_class(**options), reference_of(ours_class)(**options)
    torch.testing.assert_close(ours.betas, reference.betas, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.alphas_cumprod, reference.alphas_cumprod, rtol=1e-6, atol=1e-9)
    assert ours.timesteps.tolist() == reference.timesteps.tolist()
    ours.set_timesteps(**schedule)
    reference.set_timesteps(**schedule)
    assert ours.timesteps.tolist() == reference.timesteps.tolist()
    assert ours.timesteps.dtype == reference.timesteps.dtype
    assert (ours.order, float(ours.init_noise_sigma), len(ours)) == (reference.order, 1.0, len(reference))
    if ours_class is DPMSolverMultistepScheduler:
        torch.testing.assert_close(ours.sigmas, reference.sigmas, rtol=2e-6, atol=1e-7)
        reference.set_begin_index(0)  # else it starts with the second of two equal timesteps, and runs over the end
    ours_generator, reference_generator = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    accepted = inspect.signature(reference.step).parameters
    for ours_t, t in zip(ours.timesteps, reference.timesteps):
        assert ours.scale_model_input(x, ours_t) is x
        ours_out = ours.step(
            fake_model(x, t, channels), ours_t, x, generator=ours_generator, return_dict=False, **step or {}
        )
        reference_out = reference.step(
            fake_model(x, t, channels),
            t,
            x,
            **({"generator": reference_generator} if "generator" in accepted else {}),
            return_dict=False,
            **step or {},
        )
        assert len(ours_out) == len(reference_out)
        assert type(ours_out) is tuple
        if reference_breaks and not reference_out[0].isfinite().all():
            assert ours_out[0].isfinite().all()
            return
        for a, b in zip(ours_out, reference_out):
            assert error(a, b) <= 1e-5, f"at timestep {t}"
        x = reference_out[0]
    assert torch.equal(ours_generator.get_state(), reference_generator.get_state())  # as much noise was drawn


@pytest.mark.parametrize("ours", CLASSES)
def test_constructor_has_the_same_arguments_and_defaults(ours: type) -> None:
    expected = inspect.signature(reference_of(ours).__init__).parameters
    found = inspect.signature(ours.__init__).parameters
    more = [name for name in found if name not in expected]
    assert set(more) == ours.ignored_config_keys  # type: ignore[attr-defined]
    assert list(found)[len(expected) :] == more
    assert {name: p.default for name, p in found.items() if name not in more} == {
        name: p.default for name, p in expected.items()
    }
    assert list(found)[: len(expected)] == list(expected)


@pytest.mark.parametrize("ours", CLASSES)
@pytest.mark.parametrize("method", ["step", "set_timesteps"])
def test_methods_take_the_same_arguments_in_the_same_order(ours: type, method: str) -> None:
    expected = inspect.signature(getattr(reference_of(ours), method)).parameters
    found = inspect.signature(getattr(ours, method)).parameters
    assert [(n, p.default) for n, p in found.items()][: len(expected)] == [(n, p.default) for n, p in expected.items()]


# --- DPM-Solver -------------------------------------------------------------------------------------------------

DPM_SOLVERS = [
    {"algorithm_type": algorithm, "solver_order": order, "solver_type": solver}
    for algorithm, order, solver in itertools.product(
        ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"], [1, 2, 3], ["midpoint", "heun"]
    )
    if not (algorithm == "sde-dpmsolver" and order == 3)  # the reference crashes; ours refuses
]


def dpm(**options: Any) -> dict[str, Any]:
    if options.get("algorithm_type", "dpmsolver++") in ("dpmsolver", "sde-dpmsolver"):
        options.setdefault("final_sigmas_type", "sigma_min")
    return options


@pytest.mark.parametrize("steps", [2, 8, 16])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("solver", DPM_SOLVERS, ids=lambda s: "-".join(map(str, s.values())))
def test_dpm_solvers_and_predictions(solver: dict[str, Any], prediction: str, steps: int) -> None:
    compare(
        DPMSolverMultistepScheduler,
        dpm(prediction_type=prediction, **solver),
        {"num_inference_steps": steps},
    )


SIGMAS = [
    "none", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"
]  # fmt: skip


@pytest.mark.parametrize("steps", [1, 7, 16])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("sigmas", SIGMAS)
def test_dpm_noise_levels(sigmas: str, schedule: str, final: str, steps: int) -> None:
    options = {} if sigmas == "none" else {sigmas: True}
    if sigmas == "use_flow_sigmas":
        options |= {"flow_shift": 3.0, "prediction_type": "flow_prediction"}
    if schedule == "squaredcos_cap_v2":
        options |= {"lambda_min_clipped": -5.1}
    compare(
        DPMSolverMultistepScheduler,
        dpm(beta_schedule=schedule, final_sigmas_type=final, solver_order=3, **options),
        {"num_inference_steps": steps},
        reference_breaks=final == "sigma_min" and steps == 16,  # it divides 0 by 0: the last two levels are equal
    )


@pytest.mark.parametrize("steps", [6, 17])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("clip", [-math.inf, -5.1, -1.0])
def test_dpm_spacings(spacing: str, zero_snr: bool, clip: float, steps: int) -> None:
    compare(
        DPMSolverMultistepScheduler,
        dpm(
            timestep_spacing=spacing,
            steps_offset=1,
            rescale_betas_zero_snr=zero_snr,
            lambda_min_clipped=clip,
            prediction_type="v_prediction",
        ),
        {"num_inference_steps": steps},
    )


@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("euler", [True, False])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_orders_at_the_end(order: int, final: str, euler: bool, lower: bool, steps: int) -> None:
    compare(
        DPMSolverMultistepScheduler,
        dpm(solver_order=order, final_sigmas_type=final, euler_at_final=euler, lower_order_final=lower),
        {"num_inference_steps": steps},
    )


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"])
def test_dpm_thresholding(algorithm: str, prediction: str) -> None:
    compare(
        DPMSolverMultistepScheduler,
        dpm(
            algorithm_type=algorithm,
            prediction_type=prediction,
            thresholding=True,
            dynamic_thresholding_ratio=0.9,
            sample_max_value=1.5,
        ),
        {"num_inference_steps": 6},
    )


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
def test_dpm_leaves_a_learned_variance_out(variance: str, algorithm: str) -> None:
    options = dpm(algorithm_type=algorithm, variance_type=variance)
    compare(DPMSolverMultistepScheduler, options, {"num_inference_steps": 6}, channels=6)


@pytest.mark.parametrize("flow", [False, True])
def test_dpm_takes_a_flow_prediction(flow: bool) -> None:
    options = dpm(prediction_type="flow_prediction", use_flow_sigmas=flow)
    compare(DPMSolverMultistepScheduler, options, {"num_inference_steps": 6})


def test_dpm_dynamic_shifting() -> None:
    options = dpm(prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True)
    compare(DPMSolverMultistepScheduler, options, {"num_inference_steps": 6, "mu": 0.8})


@pytest.mark.parametrize("timesteps", [[999, 845, 730, 587, 443, 310, 193, 116, 53, 13], [400], [900, 500, 0]])
def test_dpm_custom_timesteps(timesteps: list[int]) -> None:
    compare(DPMSolverMultistepScheduler, dpm(solver_order=3), {"timesteps": timesteps})


def test_dpm_given_noise() -> None:
    noise = torch.randn(SHAPE)
    options = dpm(algorithm_type="sde-dpmsolver++")
    compare(DPMSolverMultistepScheduler, options, {"num_inference_steps": 5}, {"variance_noise": noise})


@pytest.mark.parametrize(
    "options",
    [{"algorithm_type": "deis"}, {"solver_type": "logrho"}, {"solver_type": "bh1"}, {"solver_type": "bh2"}],
)
def test_dpm_takes_the_names_of_related_solvers(options: dict[str, Any]) -> None:
    compare(DPMSolverMultistepScheduler, options | {"final_sigmas_type": "sigma_min"}, {"num_inference_steps": 6})


@pytest.mark.parametrize("begin", [None, 2])
@pytest.mark.parametrize("options", [{}, {"use_karras_sigmas": True}, {"use_flow_sigmas": True}])
def test_dpm_add_noise(options: dict[str, Any], begin: int | None) -> None:
    ours, reference = DPMSolverMultistepScheduler(**options), diffusers.DPMSolverMultistepScheduler(**options)
    original, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    for scheduler in (ours, reference):
        scheduler.set_timesteps(8)
        if begin is not None:
            scheduler.set_begin_index(begin)
    timesteps = ours.timesteps[torch.tensor([1, 5, 3])]
    expected = reference.add_noise(original, noise, timesteps)
    assert error(ours.add_noise(original, noise, timesteps), expected) <= 1e-6


def test_dpm_from_the_middle() -> None:
    ours, reference = DPMSolverMultistepScheduler(), diffusers.DPMSolverMultistepScheduler()
    x = y = torch.randn(SHAPE)
    for scheduler in (ours, reference):
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(4)
    for t in reference.timesteps[4:]:
        x = ours.step(fake_model(x, t), t, x).prev_sample
        y = reference.step(fake_model(y, t), t, y).prev_sample
        assert (ours.step_index, ours.begin_index) == (reference.step_index, reference.begin_index)
        assert error(x, y) <= 1e-5


# --- DDIM, DDPM, LCM ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("bound", ["none", "clip", "threshold"])
def test_ddim_predictions(prediction: str, eta: float, clipped: bool, bound: str) -> None:
    options = {
        "prediction_type": prediction,
        "clip_sample": bound == "clip",
        "clip_sample_range": 0.8,
        "thresholding": bound == "threshold",
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 1.5,
    }
    step = {"eta": eta, "use_clipped_model_output": clipped}
    compare(DDIMScheduler, options, {"num_inference_steps": 7}, step)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("alpha_to_one", [False, True])
@pytest.mark.parametrize("steps", [1, 12])
def test_ddim_schedules(schedule: str, spacing: str, zero_snr: bool, alpha_to_one: bool, steps: int) -> None:
    options = {
        "beta_schedule": schedule,
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": zero_snr,
        "set_alpha_to_one": alpha_to_one,
        "steps_offset": 1,
        "prediction_type": "v_prediction",
    }
    compare(DDIMScheduler, options, {"num_inference_steps": steps}, {"eta": 0.3})


def test_ddim_given_noise() -> None:
    ours, reference = DDIMScheduler(), diffusers.DDIMScheduler()
    x, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    for scheduler in (ours, reference):
        scheduler.set_timesteps(5)
    a = ours.step(fake_model(x, 600), 600, x, eta=0.5, variance_noise=noise)
    b = reference.step(fake_model(x, 600), 600, x, eta=0.5, variance_noise=noise)
    assert error(a.prev_sample, b.prev_sample) <= 1e-6
    assert error(a.pred_original_sample, b.pred_original_sample) <= 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range", None])
@pytest.mark.parametrize("bound", ["none", "clip", "threshold"])
def test_ddpm_predictions(prediction: str, variance: str | None, bound: str) -> None:
    options = {
        "prediction_type": prediction,
        "variance_type": variance,
        "clip_sample": bound == "clip",
        "clip_sample_range": 0.8,
        "thresholding": bound == "threshold",
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 1.5,
    }
    compare(DDPMScheduler, options, {"num_inference_steps": 7}, channels=6 if variance == "learned_range" else 3)


def test_ddpm_learned_variance() -> None:
    ours, reference = DDPMScheduler(variance_type="learned"), diffusers.DDPMScheduler(variance_type="learned")
    x = torch.randn(SHAPE)
    output = torch.cat([fake_model(x, 5), torch.rand(SHAPE)], dim=1)
    a = ours.step(output, 5, x, generator=torch.Generator().manual_seed(0))
    b = reference.step(output, 5, x, generator=torch.Generator().manual_seed(0))
    assert error(a.prev_sample, b.prev_sample) <= 1e-5


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 12])
def test_ddpm_schedules(schedule: str, spacing: str, zero_snr: bool, steps: int) -> None:
    options = {
        "beta_schedule": schedule,
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": zero_snr,
        "steps_offset": 1,
        "prediction_type": "v_prediction",
    }
    compare(DDPMScheduler, options, {"num_inference_steps": steps})


@pytest.mark.parametrize("timesteps", [[400], [999, 500, 20, 0]])
def test_ddpm_custom_timesteps(timesteps: list[int]) -> None:
    compare(DDPMScheduler, {}, {"timesteps": timesteps})


def test_ddpm_steps_over_the_training_schedule_without_set_timesteps() -> None:
    ours, reference = DDPMScheduler(), diffusers.DDPMScheduler()
    x = torch.randn(SHAPE)
    for t in (999, 500, 40, 0):
        a = ours.step(fake_model(x, t), t, x, generator=torch.Generator().manual_seed(t))
        b = reference.step(fake_model(x, t), t, x, generator=torch.Generator().manual_seed(t))
        assert error(a.prev_sample, b.prev_sample) <= 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("bound", ["none", "clip", "threshold"])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_lcm_predictions(prediction: str, bound: str, steps: int) -> None:
    options = {
        "prediction_type": prediction,
        "clip_sample": bound == "clip",
        "clip_sample_range": 0.8,
        "thresholding": bound == "threshold",
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 1.5,
    }
    compare(LCMScheduler, options, {"num_inference_steps": steps})


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "times",
    [
        {"num_inference_steps": 4, "original_inference_steps": 100},
        {"num_inference_steps": 3, "strength": 0.5},
        {"timesteps": [999, 759, 499, 259]},
        {"timesteps": [400]},
    ],
    ids=str,
)
def test_lcm_schedules(schedule: str, zero_snr: bool, times: dict[str, Any]) -> None:
    options = {
        "beta_schedule": schedule,
        "rescale_betas_zero_snr": zero_snr,
        "set_alpha_to_one": False,
        "timestep_scaling": 0.01,
        "prediction_type": "v_prediction",
    }
    compare(LCMScheduler, options, times)


@pytest.mark.parametrize("ours", CLASSES)
def test_twenty_steps_on_end(ours: type) -> None:
    x = y = torch.randn(SHAPE)
    first, second = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    scheduler, reference = ours(), reference_of(ours)()
    for each in (scheduler, reference):
        each.set_timesteps(20)
    for t in scheduler.timesteps:
        x = scheduler.step(fake_model(x, t), t, x, generator=first).prev_sample
        y = reference.step(fake_model(y, t), t, y, generator=second).prev_sample
    assert error(x, y) <= 1e-5


# --- all ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", CLASSES)
def test_trained_betas(ours: type) -> None:
    betas = np.linspace(0.001, 0.05, 100)
    options = {"trained_betas": betas, "num_train_timesteps": 100}
    if ours is LCMScheduler:
        options["original_inference_steps"] = 20
    compare(ours, options, {"num_inference_steps": 5})


@pytest.mark.parametrize("ours", [DDIMScheduler, DDPMScheduler, LCMScheduler])
def test_add_noise_and_velocity(ours: type) -> None:
    scheduler, reference = ours(), reference_of(ours)()
    original, noise, timesteps = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    for method in ("add_noise", "get_velocity"):
        expected = getattr(reference, method)(original, noise, timesteps)
        assert error(getattr(scheduler, method)(original, noise, timesteps), expected) <= 1e-6


@pytest.mark.parametrize("ours", CLASSES)
def test_folders_load_in_the_other(ours: type, tmp_path: Any) -> None:
    options = {"num_train_timesteps": 500, "beta_end": 0.03, "prediction_type": "v_prediction"}
    ours(**options).save_pretrained(tmp_path / "ours")
    reference_of(ours)(**options).save_pretrained(tmp_path / "theirs")
    loaded = ours.from_pretrained(tmp_path, subfolder="theirs")
    theirs = reference_of(ours).from_pretrained(tmp_path / "ours")
    keys = list(inspect.signature(reference_of(ours).__init__).parameters)[1:]
    assert {k: loaded.config[k] for k in keys} == {k: theirs.config[k] for k in keys}
    assert loaded.config.num_train_timesteps == 500
    assert torch.equal(loaded.betas, theirs.betas)
    mine, other = (json.loads((tmp_path / f / "scheduler_config.json").read_text()) for f in ("ours", "theirs"))
    assert mine == other


PAIRS = [(a, b) for a, b in itertools.product(CLASSES, CLASSES) if a is not b]


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("published", [False, True])
def test_one_config_builds_another_class_as_in_diffusers(first: type, second: type, published: bool) -> None:
    """Defaults of the first class do not override those of the second; given values do."""
    options: dict[str, Any] = {"beta_end": 0.03, "num_train_timesteps": 800}
    if published:
        options |= {"timestep_spacing": "linspace", "steps_offset": 1, "prediction_type": "v_prediction"}
        if "variance_type" in inspect.signature(first.__init__).parameters and first is DPMSolverMultistepScheduler:
            options |= {"variance_type": None}
    theirs = reference_of(second).from_config(reference_of(first)(**options).config)
    keys = list(inspect.signature(reference_of(second).__init__).parameters)[1:]
    for config in (first(**options).config, reference_of(first)(**options).config):
        ours = second.from_config(config)
        assert {k: ours.config[k] for k in keys} == {k: theirs.config[k] for k in keys}


@pytest.mark.parametrize("foreign", ["EulerDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler"])
def test_foreign_configs_are_taken_quietly(foreign: str, caplog: pytest.LogCaptureFixture) -> None:
    config = getattr(diffusers, foreign)(beta_end=0.015, beta_schedule="scaled_linear").config
    ours = DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++")
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++")
    assert torch.equal(ours.betas, theirs.betas)
    assert ours.config.timestep_spacing == theirs.config.timestep_spacing
    assert not caplog.records


@pytest.mark.parametrize("ours", CLASSES)
@pytest.mark.parametrize("generators", ["one", "list"])
def test_a_diffusers_pipeline_draws_the_same_with_our_scheduler(ours: type, generators: str) -> None:
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=8,
        caption_channels=8, cross_attention_dim=16, use_additional_conditions=False,
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)  # as it is made, its output is zero
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    pictures = []
    for scheduler in (ours(), reference_of(ours)()):
        pipe = diffusers.PixArtSigmaPipeline(None, None, vae, transformer, scheduler)
        pipe.set_progress_bar_config(disable=True)
        seeds = [torch.Generator().manual_seed(s) for s in (1, 2)]
        pictures.append(
            pipe(
                prompt=None,
                negative_prompt=None,
                prompt_embeds=torch.ones(2, 5, 8),
                prompt_attention_mask=torch.ones(2, 5, dtype=torch.long),
                negative_prompt_embeds=torch.zeros(2, 5, 8),
                negative_prompt_attention_mask=torch.ones(2, 5, dtype=torch.long),
                num_inference_steps=4,
                height=8,
                width=8,
                use_resolution_binning=False,
                eta=0.5,
                generator=seeds if generators == "list" else seeds[0],
                output_type="latent",
            ).images
        )
    assert error(*pictures) <= 1e-4
