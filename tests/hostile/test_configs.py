"""Config files and constructor arguments that no model or scheduler can have: refused by file and key, unbuilt."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.hostile.sandbox import copy_of, edit_json, refused, run

import impasto
from impasto.scenes.judge import Judge

NAN, INFINITY = math.nan, math.inf
CLASSES = {
    "transformer": "PixArtTransformer2DModel",
    "vae": "AutoencoderKL",
    "scheduler": "DPMSolverMultistepScheduler",
}
SCHEDULERS = ("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler")
FLOW = "FlowMatchEulerDiscreteScheduler"


def load(cls: str, folder: Path) -> str:
    return type(getattr(impasto, cls).from_pretrained(folder)).__name__


def build(cls: str, values: dict[str, Any]) -> str:
    return type(getattr(impasto, cls)(**values)).__name__


def from_config(cls: str, values: Any) -> str:
    return type(getattr(impasto, cls).from_config(values)).__name__


def build_judge(values: dict[str, Any]) -> str:
    return type(Judge(**values)).__name__


def load_subfolder(cls: str, folder: Path, subfolder: Any) -> str:
    return type(getattr(impasto, cls).from_pretrained(folder, subfolder=subfolder)).__name__


def load_model(cls: str, model: Any) -> str:
    return type(getattr(impasto, cls).from_pretrained(model)).__name__


def set_timesteps(cls: str, config: dict[str, Any], arguments: dict[str, Any]) -> str:
    getattr(impasto, cls)(**config).set_timesteps(**arguments)
    return "made"


def cases(table: dict[tuple[str, ...], list[Any]]) -> Any:
    """One parameter set for each key and value; an id is such as ``num_layers=0``."""
    return [
        pytest.param(key, value, id=f"{key}={str(value)[:20]}")
        for keys, values in table.items()
        for key in keys
        for value in values
    ]


WHOLE = [0, -1, 10**9, 10**30, 2.5, True, "8", [8], {"a": 1}, NAN]
NUMBER = ["0.1", [0.1], True, NAN, INFINITY, -INFINITY, 10**400]

PIXART = {
    ("num_layers",): [*WHOLE, None],
    ("sample_size", "patch_size", "attention_head_dim"): [0, 10**9, "8", None, [8]],
    ("num_attention_heads", "in_channels", "norm_num_groups"): [0, 10**9, None],
    ("out_channels", "cross_attention_dim", "caption_channels", "num_embeds_ada_norm"): [0, 10**9, 2.5],
    ("norm_eps",): [*NUMBER, None, 0, -1e-6, 2],
    ("interpolation_scale",): [NAN, "2", 0, -1, 1e-300],
    ("dropout",): ["0", -0.1, 1.0, NAN],
    ("attention_bias", "upcast_attention"): ["false", 0, None],
    ("use_additional_conditions",): ["yes", 1],
    ("norm_type", "activation_fn", "attention_type"): ["unknown", 5, {"a": 1}, "\x1b[2J" + "x" * 5000],
}
VAE = {
    ("in_channels", "latent_channels", "layers_per_block", "norm_num_groups"): [0, 10**9, None],
    ("block_out_channels",): [[], [0, 8], [8, "8"], "88", 8, None, [8] * 17, [8, 8.0], [8, 10**9]],
    ("down_block_types",): [[], [1, 2], "DownEncoderBlock2D", None, ["x", "y"], 5],
    ("up_block_types",): [["x", "y"], [["UpDecoderBlock2D"]] * 2],
    ("sample_size",): [0, "16", None, [16, 0], [16, "x"], 2.5],
    ("scaling_factor",): [*NUMBER, None, 0, -0.18, 1e-300],
    ("shift_factor",): ["0", NAN, 1e300],
    ("latents_mean",): [0.5, "0000", [0.5], [0.5] * 100_001, [NAN] * 4, ["1"] * 4, [None] * 4, [1e300] * 4],
    ("latents_std",): [[0.0] * 4, [-1.0] * 4, [1.0] * 3],
    ("force_upcast",): ["false", 0, None],
    ("act_fn",): [None, "unknown"],
}
DPM = {
    ("num_train_timesteps",): [0, 1, -5, 10**9, 10**30, "1000", 2.5, None, NAN, True],
    ("beta_start",): [*NUMBER, None, -0.1, 1.5],
    ("beta_end",): [NAN, "0.02", 1.5],
    ("trained_betas",): ["0.1", 0.1, [NAN] * 1000, [2.0] * 1000, ["x"] * 1000, [[0.1]] * 1000, [0.1], {"a": 1}],
    ("lambda_min_clipped",): ["-inf", None, NAN, INFINITY, [1], 10**30, 100],
    ("solver_order",): [0, 4, 2.5, "2", None],
    ("dynamic_thresholding_ratio",): [-1, NAN],
    ("sample_max_value", "flow_shift"): [0, NAN, "1", None],
    ("steps_offset",): [-1, 10**9, 0.5],
    ("thresholding", "use_karras_sigmas"): ["false", 0, None],
    ("beta_schedule", "algorithm_type", "prediction_type"): ["unknown", None, ["linear"]],
}


@pytest.mark.parametrize(("key", "value"), cases(PIXART))
def test_transformer(pixart_folder: Path, tmp_path: Path, key: str, value: Any) -> None:
    refuses(pixart_folder, tmp_path, "transformer", "config.json", key, value)


@pytest.mark.parametrize(("key", "value"), cases(VAE))
def test_autoencoder(pixart_folder: Path, tmp_path: Path, key: str, value: Any) -> None:
    refuses(pixart_folder, tmp_path, "vae", "config.json", key, value)


@pytest.mark.parametrize(("key", "value"), cases(DPM))
def test_scheduler(pixart_folder: Path, tmp_path: Path, key: str, value: Any) -> None:
    refuses(pixart_folder, tmp_path, "scheduler", "scheduler_config.json", key, value)


def refuses(good: Path, tmp_path: Path, component: str, file: str, key: str, value: Any) -> None:
    folder = copy_of(good / component, tmp_path / component)
    edit_json(folder / file, **{key: value})
    outcome = run(load, CLASSES[component], folder)
    refused(outcome, "ConfigurationError", file, key)
    assert "\x1b" not in outcome.message


GLM = {
    ("num_layers", "time_embed_dim"): [0, 10**9, 2.5, "2", None],
    ("patch_size", "text_embed_dim", "condition_dim", "sample_size"): [0, 10**9],
    ("pos_embed_max_size", "prior_vq_quantizer_codebook_size"): [0, 10**9],
}


@pytest.mark.parametrize(("key", "value"), cases(GLM))
def test_glm_image_transformer(glm_folder: Path, tmp_path: Path, key: str, value: Any) -> None:
    folder = copy_of(glm_folder / "transformer", tmp_path / "transformer")
    edit_json(folder / "config.json", **{key: value})
    refused(run(load, "GlmImageTransformer2DModel", folder), "ConfigurationError", "config.json", key)


EACH_SCHEDULER = {
    ("num_train_timesteps",): [1, 10**9, "1000"],
    ("beta_start",): [NAN, 0],
    ("rescale_betas_zero_snr",): ["no"],
}
OF_ONE = {
    "DDIMScheduler": {("clip_sample_range",): [0, NAN], ("set_alpha_to_one",): ["yes"]},
    "DDPMScheduler": {("variance_type",): [5, "unknown", ["fixed_small"]], ("clip_sample",): [1]},
    "LCMScheduler": {("original_inference_steps",): [0, 10**9, "50"], ("timestep_scaling",): [0, NAN, "10"]},
    FLOW: {
        ("num_train_timesteps",): [1, 10**9, "1000", None],
        ("shift",): [NAN, "1", 0, None],
        ("base_shift", "max_shift"): [NAN, 1000, "1"],
        ("base_image_seq_len", "max_image_seq_len"): [0, 10**30],
        ("shift_terminal",): [1.0, -0.1, NAN, "0"],
        ("time_shift_type",): [None, "cubic", ["linear"]],
        ("use_dynamic_shifting", "invert_sigmas"): ["no", None],
    },
}
SCHEDULER_CASES = [
    pytest.param(cls, *case.values, id=f"{cls}, {case.id}")
    for classes, table in [(SCHEDULERS, EACH_SCHEDULER), *(((cls,), table) for cls, table in OF_ONE.items())]
    for cls in classes
    for case in cases(table)
]


@pytest.mark.parametrize(("cls", "key", "value"), SCHEDULER_CASES)
def test_each_scheduler(tmp_path: Path, cls: str, key: str, value: Any) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": cls, key: value}))
    refused(run(load, cls, tmp_path), "ConfigurationError", "scheduler_config.json", key)


@pytest.mark.parametrize("key", ["fine_channels", "coarse_channels", "hidden_channels", "blocks"])
@pytest.mark.parametrize("value", [0, 10**9, "48"])
def test_judge(key: str, value: Any) -> None:
    refused(run(build_judge, {key: value}), "ConfigurationError", "Judge", key)


@pytest.mark.parametrize(
    ("cls", "values", "named"),
    [
        ("PixArtTransformer2DModel", {"num_attention_heads": 60_000, "attention_head_dim": 60_000}, "3600000000"),
        ("GlmImageTransformer2DModel", {"num_attention_heads": 60_000, "attention_head_dim": 60_000}, "3600000000"),
        ("DDIMScheduler", {"beta_start": 1.0, "beta_end": 1.0}, "beta_start"),
        ("DDPMScheduler", {"num_train_timesteps": 100_000}, "num_train_timesteps"),
        ("DDIMScheduler", {"trained_betas": torch.zeros(1000, device="meta")}, "trained_betas"),
        ("DDIMScheduler", {"trained_betas": np.array(["x"] * 1000)}, "trained_betas"),
        ("PixArtTransformer2DModel", {"num_layers": np.array([1, 2])}, "num_layers"),
        ("PixArtTransformer2DModel", {"num_layers": object()}, "num_layers"),
    ],
)
def test_arguments_of_constructors(cls: str, values: dict[str, Any], named: str) -> None:
    refused(run(build, cls, {**values}), "ConfigurationError", named)


@pytest.mark.parametrize("config", [None, 5, "config.json", ["a"]], ids=str)
@pytest.mark.parametrize("cls", ["PixArtTransformer2DModel", "DDIMScheduler"])
def test_what_is_no_config(cls: str, config: Any) -> None:
    refused(run(from_config, cls, config), "ConfigurationError", "from_config")


# --- files ---


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(target: str) -> Any:
    def apply(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return apply


def _content(content: bytes) -> Any:
    return lambda path: path.write_bytes(content)


FILES = {
    "empty": _content(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "a list": _content(b"[1]"),
    "a number": _content(b"1"),
    "null": _content(b"null"),
    "not UTF-8": _content(b'{"a": "\xff"}'),
    "UTF-16": _content('{"a": 1}'.encode("utf-16")),
    "a byte order mark": _content(b"\xef\xbb\xbf{}"),
    "deep lists": _content(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep objects": _content(b'{"a":' * 100_000),
    "an integer of 5,000 digits": _content(b'{"num_layers": ' + b"9" * 5000 + b"}"),
    "an integer of a million digits": _content(b'{"num_layers": ' + b"9" * 1_000_000 + b"}"),
    "a key twice": _content(b'{"num_layers": 1, "num_layers": 2}'),
    "a key twice, far inside": _content(b'{"a": [{"b": 1, "b": 2}]}'),
    "a million keys twice": _content(b"{" + b", ".join(b'"%d": 1' % (i % 400_000) for i in range(800_000)) + b"}"),
    "11 MB": _content(b'{"a": "' + b"x" * 11_000_000 + b'"}'),
    "a pipe": _pipe,
    "a folder": _folder,
    "a device": _link("/dev/zero"),
    "a link to nothing": _link("nothing"),
    "a link in a circle": _link("config.json"),
    "a link to a long name": _link("x" * 300),
}


@pytest.mark.parametrize("damage", FILES.values(), ids=FILES)
def test_what_is_no_file_of_json(pixart_folder: Path, tmp_path: Path, damage: Any) -> None:
    folder = copy_of(pixart_folder / "transformer", tmp_path / "transformer")
    damage(folder / "config.json")
    refused(run(load, "PixArtTransformer2DModel", folder), "CheckpointError", "config.json")


@pytest.mark.parametrize("values", [5, "x", [[1]], [{"a": 1}], {"a": 1}, None], ids=str)
def test_the_list_of_defaults_of_a_scheduler_may_be_anything(tmp_path: Path, values: Any) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_use_default_values": values}))
    assert run(load, "DDIMScheduler", tmp_path).value == "DDIMScheduler"


LOADERS = ("AutoencoderKL", "PixArtSigmaPipeline", "GlmImagePipeline")


@pytest.mark.parametrize("cls", LOADERS)
@pytest.mark.parametrize(
    ("subfolder", "error", "named"),
    [
        ("x" * 300, "InputError", "subfolder"),
        ("\0", "InputError", "subfolder"),
        (5, "InputError", "subfolder"),
        ("vae\udc80", "InputError", "subfolder"),
        ("model_index.json", "InputError", "is a file"),
        ("nowhere", "CheckpointNotFoundError", "nowhere"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_subfolders(pixart_folder: Path, cls: str, subfolder: Any, error: str, named: str) -> None:
    refused(run(load_subfolder, cls, pixart_folder, subfolder), error, named)


@pytest.mark.parametrize("cls", LOADERS)
@pytest.mark.parametrize(
    "model", [5, None, b"model", "x" * 5000, "a/" + "b" * 5000, "a\0b", "a/\x1b[2J", "", "a/\udc80"], ids=ascii
)
def test_names_of_models(cls: str, model: Any) -> None:
    outcome = run(load_model, cls, model)
    error = "CheckpointNotFoundError" if isinstance(model, str) else "InputError"
    refused(outcome, error, ascii(model)[:8].strip("'\\") if model and isinstance(model, str) else repr(model))
    assert outcome.message.isprintable()
    assert len(outcome.message) < 600


# --- schedules ---


@pytest.mark.parametrize(
    ("cls", "config", "arguments", "named"),
    [
        (cls, {}, arguments, named)
        for cls in ("DPMSolverMultistepScheduler", FLOW)
        for arguments, named in [
            ({"num_inference_steps": "20"}, "num_inference_steps"),
            ({"num_inference_steps": 10**9}, "num_inference_steps"),
            ({"num_inference_steps": NAN}, "num_inference_steps"),
            ({"timesteps": "900"}, "timesteps"),
            ({"timesteps": 5}, "timesteps"),
            ({"timesteps": ["900"]}, "timesteps"),
            ({"timesteps": [None]}, "timesteps"),
            ({"timesteps": [NAN]}, "timesteps"),
            ({"sigmas": [[1.0]]}, "sigmas"),
            ({"sigmas": ["x"]}, "sigmas"),
            ({"sigmas": [10**400]}, "sigmas"),
        ]
    ]
    + [
        (cls, {"use_dynamic_shifting": True}, {"num_inference_steps": 3, "mu": mu}, "mu")
        for cls in ("DPMSolverMultistepScheduler", FLOW)
        for mu in (NAN, INFINITY, 1000, "1", [1])
    ],
)
def test_schedules(cls: str, config: dict[str, Any], arguments: dict[str, Any], named: str) -> None:
    refused(run(set_timesteps, cls, config, arguments), "InputError", named)


# --- what is good stays good ---

#: As published, unknown and legacy keys included.
PUBLISHED = {
    "DPMSolverMultistepScheduler": """{"_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.22.0",
        "algorithm_type": "dpmsolver++", "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001,
        "dynamic_thresholding_ratio": 0.995, "euler_at_final": false, "lambda_min_clipped": -Infinity,
        "lower_order_final": true, "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0,
        "solver_order": 2, "solver_type": "midpoint", "steps_offset": 0, "thresholding": false,
        "timestep_spacing": "linspace", "trained_betas": null, "use_karras_sigmas": false, "use_lu_lambdas": false,
        "variance_type": null}""",
    "LCMScheduler": """{"beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": false,
        "clip_sample_range": 1.0, "original_inference_steps": 50, "set_alpha_to_one": true, "steps_offset": 0,
        "timestep_scaling": 10.0, "trained_betas": null}""",
    FLOW: """{"base_image_seq_len": 256, "base_shift": 0.25, "max_shift": 0.75, "shift": 1, "shift_terminal": null,
        "time_shift_type": "linear", "use_dynamic_shifting": true}""",
    "DDPMScheduler": """{"variance_type": "learned_range", "clip_sample": false, "steps_offset": 1}""",
    "DDIMScheduler": """{"skip_prk_steps": true, "set_alpha_to_one": false, "steps_offset": 1}""",
}


@pytest.mark.parametrize("cls", PUBLISHED)
def test_published_configs_load(tmp_path: Path, cls: str) -> None:
    (tmp_path / "scheduler_config.json").write_text(PUBLISHED[cls])
    outcome = run(load, cls, tmp_path)
    assert outcome.value == cls, outcome.trace


@pytest.mark.parametrize("source", [*SCHEDULERS, FLOW])
@pytest.mark.parametrize("target", [*SCHEDULERS, FLOW])
def test_schedulers_are_built_from_each_other(source: str, target: str) -> None:
    config = getattr(impasto, source)().config
    assert type(getattr(impasto, target).from_config(config)).__name__ == target


def test_numbers_of_numpy_are_numbers() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    scheduler = impasto.DDIMScheduler(num_train_timesteps=np.int64(1000), trained_betas=betas)
    assert scheduler.config.num_train_timesteps == 1000
    assert type(scheduler.config.num_train_timesteps) is int
    assert torch.allclose(scheduler.betas, torch.from_numpy(betas).float())
    assert json.dumps(scheduler.config.trained_betas) == json.dumps(betas.tolist())


@pytest.mark.parametrize("values", [{"interpolation_scale": 1}, {"out_channels": None}, {"num_embeds_ada_norm": 1000}])
def test_values_are_kept_as_given(values: dict[str, Any]) -> None:
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "cross_attention_dim": 24}
    config = impasto.PixArtTransformer2DModel(**small, sample_size=8, caption_channels=8, **values).config
    key, value = next(iter(values.items()))
    assert config[key] == value
    assert type(config[key]) is type(value)
