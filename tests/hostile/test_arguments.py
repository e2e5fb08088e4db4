"""Arguments that no pipeline can use: refused with an InputError that names them, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import impasto
from impasto import DDPMScheduler, InputError, PixArtSigmaPipeline
from impasto.checks import MAX_CHARACTERS

from ..tiny import tiny_pipeline
from ..tiny_glm import pipelines, prior_parts
from .sandbox import refused, run

PIXART: Any = tiny_pipeline(PixArtSigmaPipeline)
GLM: Any = pipelines()[0]
for component, value in prior_parts().items():
    setattr(GLM, component, value)
PIXART_CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent", "height": 16}
GLM_CALL: dict[str, Any] = {
    "prompt": "a cat",
    "num_inference_steps": 2,
    "output_type": "latent",
    "height": 64,
    "width": 96,
    "prior_token_ids": torch.zeros(1, 24, dtype=torch.long),
}


def returns(value: Any) -> Any:
    return lambda *_: value


EMBEDS, MASK = torch.zeros(1, 5, 32), torch.ones(1, 5)
META = torch.zeros(1, device="meta")
HUGE = 10**5000
NUMBERS: dict[str, Any] = {"nan": math.nan, "inf": math.inf, "text": "7", "None": None, "True": True, "list": [1]}
WHOLE: dict[str, Any] = {**NUMBERS, "0": 0, "-1": -1, "2.5": 2.5, "10**9": 10**9, "5,000 digits": HUGE, "meta": META}
SCALES: dict[str, Any] = {**NUMBERS, "1e300": 1e300, "-2000": -2000, "5,000 digits": HUGE, "complex": 1j, "meta": META}


def latents(*shape: int) -> dict[str, Any]:
    good = torch.zeros(*shape)
    return {
        "numpy": good.numpy(),
        "list": [1.0],
        "text": "noise",
        "meta": good.to("meta"),
        "sparse": good.to_sparse(),
        "integers": good.long(),
        "bool": good.bool(),
        "complex": good.to(torch.complex64),
        "NaN": good + math.nan,
        "infinite": good + math.inf,
        "shape": good[..., 1:],
        "dimensions": good[0],
    }


SCHEDULES: dict[str, Any] = {
    "text": "abc",
    "texts": ["a", "b"],
    "NaN": [math.nan],
    "None inside": [None],
    "empty": [],
    "number": 5,
    "dict": {1: 2},
    "meta": torch.zeros(3, device="meta"),
    "matrix": np.zeros((2, 2)),
    "negative": [5.0, -5.0],
    "nested": [[1.0]],
    "complex": [1j],
    "a million": [0.0] * 1_000_000,
}
TEXTS: dict[str, Any] = {
    "number": 3,
    "no texts": [],
    "numbers": [3],
    "bytes": b"a cat",
    "set": {"a cat"},
    "100,000 characters": "a" * 100_000,
    "a long one of two": ["a cat", "b" * 100_000],
    "surrogate": "caf\udce9",
}
COMMON: dict[str, dict[str, Any]] = {
    "guidance_scale": SCALES,
    "num_images_per_prompt": {name: value for name, value in WHOLE.items() if name != "None"},
    "num_inference_steps": WHOLE,
    "height": {name: value for name, value in WHOLE.items() if name != "None"},
    "width": {name: WHOLE[name] for name in ("nan", "text", "0", "10**9", "5,000 digits")},
    "max_sequence_length": {name: WHOLE[name] for name in ("None", "nan", "text", "0", "10**9")},
    "timesteps": SCHEDULES,
    "sigmas": {name: SCHEDULES[name] for name in ("text", "NaN", "empty", "number", "matrix", "a million")},
    "generator": {"number": 3, "text": "cpu", "numbers": [1], "too many": [torch.Generator()] * 3},
    "output_type": {"jpeg": "jpeg", "None": None, "number": 3, "list": ["pil"]},
    "callback_on_step_end": {
        "text": "f",
        "number": 3,
        "returns a number": returns(7),
        "returns a text": returns("latents"),
        "returns a list": returns([1]),
        "returns another name": returns({"noise": torch.zeros(1)}),
        "returns a number for a name": returns({1: torch.zeros(1)}),
        "returns None latents": returns({"latents": None}),
        "returns NumPy latents": returns({"latents": np.zeros((1, 4, 8, 8))}),
        "returns other latents": returns({"latents": torch.zeros(1, 4, 2, 2)}),
        "returns a text for embeddings": returns({"prompt_embeds": "a cat"}),
        "returns more embeddings": returns({"prompt_embeds": torch.zeros(3, 5, 32)}),
        "returns meta embeddings": returns({"prompt_embeds": EMBEDS.to("meta")}),
    },
    "callback_on_step_end_tensor_inputs": {"noise": ["noise"], "number": 3, "numbers": [3], "text": "x"},
    "prompt": TEXTS,
    "negative_prompt": {**TEXTS, "too many": ["a", "b", "c"]},
}
PIXART_ONLY: dict[str, dict[str, Any]] = {
    "eta": {**NUMBERS, "-1": -1, "2": 2},
    "callback": {"number": 5, "text": "f"},
    "callback_steps": {name: WHOLE[name] for name in ("None", "0", "2.5", "text")},
    "latents": latents(1, 4, 8, 8),
}
GLM_ONLY: dict[str, dict[str, Any]] = {
    "latents": latents(1, 4, 8, 12),
    "crops_coords_top_left": {
        "None": None,
        "one": (1,),
        "texts": ("a", "b"),
        "NaN": (math.nan, 0),
        "negative": (-1, 0),
        "large": (10**9, 0),
    },
    "attention_kwargs": {"number": 3, "gain": {"gain": 1}, "text": "scale"},
    "prior_token_ids": {
        "list": [[0] * 24],
        "floats": torch.zeros(1, 24),
        "meta": torch.zeros(1, 24, dtype=torch.long, device="meta"),
        "too large": torch.full((1, 24), 32),
        "text": "tokens",
        "dimensions": torch.zeros(24, dtype=torch.long),
    },
    "prior_token_image_ids": {"number": 3, "tensor": torch.zeros(1, 16, dtype=torch.long)},
    "source_image_grid_thw": {"number": 3, "meta": [torch.ones(1, 3, dtype=torch.long, device="meta")]},
    "image": {
        "text": "cat.png",
        "number": 3,
        "flat": np.zeros(64),
        "texts": ["cat.png"],
    },
}


def cases(*tables: dict[str, dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(name, case, id=f"{name}: {case}") for table in tables for name in table for case in table[name]
    ]


def call_pixart(name: str, case: str) -> None:
    PIXART(**{**PIXART_CALL, name: {**COMMON, **PIXART_ONLY}[name][case]})


def call_glm(name: str, case: str) -> None:
    GLM(**{**GLM_CALL, name: {**COMMON, **GLM_ONLY}[name][case]})


@pytest.mark.parametrize(("name", "case"), cases(COMMON, PIXART_ONLY))
def test_pixart(name: str, case: str) -> None:
    refused(run(call_pixart, name, case), "InputError", name.removesuffix("_tensor_inputs"))


#: The functions that check these are those of PixArt: that they are called is what has to be seen.
SOME = {name: dict(list(table.items())[-4:]) for name, table in COMMON.items()}


@pytest.mark.parametrize(("name", "case"), cases(SOME, GLM_ONLY))
def test_glm_image(name: str, case: str) -> None:
    refused(run(call_glm, name, case), "InputError", name.removesuffix("_tensor_inputs"))


# --- several arguments at once, and other methods ---

GIVEN = {"prompt": None, "prompt_embeds": EMBEDS, "prompt_attention_mask": MASK}
OTHERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "embeds of NumPy": (lambda: PIXART(**PIXART_CALL | GIVEN | {"prompt_embeds": EMBEDS.numpy()}), ("prompt_embeds",)),
    "embeds of integers": (lambda: PIXART(**PIXART_CALL | GIVEN | {"prompt_embeds": EMBEDS.int()}), ("prompt_embeds",)),
    "embeds on meta": (
        lambda: PIXART(**PIXART_CALL | GIVEN | {"prompt_embeds": EMBEDS.to("meta")}),
        ("prompt_embeds",),
    ),
    "embeds of NaN": (lambda: PIXART(**PIXART_CALL | GIVEN | {"prompt_embeds": EMBEDS + math.nan}), ("prompt_embeds",)),
    "embeds sparse": (
        lambda: PIXART(**PIXART_CALL | GIVEN | {"prompt_embeds": EMBEDS.to_sparse()}),
        ("prompt_embeds",),
    ),
    "no embeds": (lambda: PIXART(**PIXART_CALL | GIVEN | {"prompt_embeds": EMBEDS[:0]}), ("prompt_",)),
    "mask of NumPy": (
        lambda: PIXART(**PIXART_CALL | GIVEN | {"prompt_attention_mask": MASK.numpy()}),
        ("prompt_attention_mask",),
    ),
    "mask on meta": (
        lambda: PIXART(**PIXART_CALL | GIVEN | {"prompt_attention_mask": MASK.to("meta")}),
        ("prompt_attention_mask",),
    ),
    "mask complex": (
        lambda: PIXART(**PIXART_CALL | GIVEN | {"prompt_attention_mask": MASK.to(torch.complex64)}),
        ("prompt_attention_mask",),
    ),
    "mask of NaN": (
        lambda: PIXART(**PIXART_CALL | GIVEN | {"prompt_attention_mask": MASK * math.nan}),
        ("prompt_attention_mask",),
    ),
    "GLM embeds of NumPy": (
        lambda: GLM(**GLM_CALL | {"prompt": None, "prompt_embeds": np.zeros((1, 2, 16))}),
        ("prompt_embeds",),
    ),
    "GLM embeds on meta": (
        lambda: GLM(**GLM_CALL | {"prompt": None, "prompt_embeds": torch.zeros(1, 2, 16, device="meta")}),
        ("prompt_embeds",),
    ),
    "GLM embeds too wide": (
        lambda: GLM(**GLM_CALL | {"prompt": None, "prompt_embeds": torch.zeros(1, 2, 17)}),
        ("prompt_embeds", "16"),
    ),
    "GLM negative embeds of another count": (
        lambda: GLM(**GLM_CALL | {"negative_prompt_embeds": torch.zeros(2, 2, 16)}),
        ("negative_prompt_embeds",),
    ),
    "GLM size in the prompt": (
        lambda: GLM(**GLM_CALL | {"prompt": "<sop>99999999 99999999<eop>", "height": None}),
        ("height",),
    ),
    "GLM timesteps and sigmas": (
        lambda: GLM(**GLM_CALL | {"timesteps": [5, 4], "sigmas": [0.5]}),
        ("2 timesteps and 1 sigmas",),
    ),
    "a scheduler without sigmas": (
        lambda: tiny_pipeline(PixArtSigmaPipeline, scheduler=DDPMScheduler())(**PIXART_CALL, sigmas=[1.0]),
        ("sigmas", "DDPMScheduler"),
    ),
    "encode: images": (lambda: PIXART.encode_prompt("a cat", num_images_per_prompt=0), ("num_images_per_prompt",)),
    "encode: length": (lambda: PIXART.encode_prompt("a cat", max_sequence_length=10**9), ("max_sequence_length",)),
    "encode: device": (lambda: PIXART.encode_prompt("a cat", device="toaster"), ("toaster",)),
    "GLM encode: images": (lambda: GLM.encode_prompt("a cat", num_images_per_prompt="2"), ("num_images_per_prompt",)),
    "GLM encode: length": (lambda: GLM.encode_prompt("a cat", max_sequence_length=0), ("max_sequence_length",)),
    "to a toaster": (lambda: PIXART.to("toaster"), ("toaster",)),
    "to a number": (lambda: PIXART.to(device=1.5), ("1.5",)),
    "GLM to a toaster": (lambda: GLM.to("toaster"), ("toaster",)),
    "offload to a toaster": (lambda: PIXART.enable_model_cpu_offload(device="toaster"), ("toaster",)),
    "groups of none": (lambda: PIXART.enable_group_offload(num_blocks_per_group=0), ("num_blocks_per_group",)),
    "post: kind": (lambda: PIXART.image_processor.postprocess(torch.zeros(1, 3, 8, 8), ["pil"]), ("output_type",)),
}


def other(case: str) -> None:
    OTHERS[case][0]()


@pytest.mark.parametrize("case", OTHERS)
def test_others(case: str) -> None:
    refused(run(other, case), "InputError", *OTHERS[case][1])


# --- what is right stays right ---


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    numbers = {
        "guidance_scale": np.float32(3),
        "num_inference_steps": np.int64(2),
        "height": np.int32(16),
        "width": torch.tensor(16),
        "eta": np.float64(0),
        "max_sequence_length": np.int16(20),
        "num_images_per_prompt": np.uint8(2),
        "callback_steps": np.int64(1),
    }
    plain = {name: value.item() for name, value in numbers.items()}
    seeded = {"generator": torch.Generator().manual_seed(0)}
    found = PIXART(**PIXART_CALL | numbers | seeded).images
    seeded = {"generator": torch.Generator().manual_seed(0)}
    assert torch.equal(found, PIXART(**PIXART_CALL | plain | seeded).images)
    times = {"timesteps": np.array([800, 20]), "generator": torch.Generator().manual_seed(0)}
    found = PIXART(**PIXART_CALL | times).images
    times = {"timesteps": [800, 20], "generator": torch.Generator().manual_seed(0)}
    assert torch.equal(found, PIXART(**PIXART_CALL | times).images)
    assert GLM(**GLM_CALL | {"guidance_scale": np.float16(2), "num_inference_steps": np.int8(1)}).images.shape[0] == 1


@pytest.mark.parametrize("pipe", ["PIXART", "GLM"])
def test_none_images_per_prompt_are_one(pipe: str) -> None:
    call = PIXART_CALL if pipe == "PIXART" else GLM_CALL
    assert globals()[pipe](**call, num_images_per_prompt=None).images.shape[0] == 1


def test_the_longest_prompt_is_taken() -> None:
    outcome = run(longest_prompt)
    assert outcome.kind == "returned", outcome
    assert outcome.value == [1, 4, 8, 8]


def longest_prompt() -> list[int]:
    return list(PIXART(**PIXART_CALL | {"prompt": "a cat " * (MAX_CHARACTERS // 6)}).images.shape)


def test_a_callback_may_return_latents_of_another_precision() -> None:
    call = PIXART_CALL | {"callback_on_step_end": lambda *_: {"latents": _[3]["latents"].double()}}
    assert PIXART(**call).images.dtype == torch.float32


def test_a_callback_is_refused_where_it_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"latents that callback_on_step_end returned .*NaN"):
        PIXART(**PIXART_CALL | {"callback_on_step_end": lambda *_: {"latents": _[3]["latents"] * math.nan}})


# --- paths, devices and steps ---

NOT_PATHS = {"number": 3, "None": None, "bytes": b"folder", "list": ["folder"]}
SAVES: dict[str, Callable[[Any], Any]] = {
    "pipeline": lambda path: PIXART.save_pretrained(path),
    "model": lambda path: PIXART.vae.save_pretrained(path),
    "scheduler": lambda path: PIXART.scheduler.save_pretrained(path),
    "config": lambda path: PIXART.vae.save_config(path),
    "prompt cache": lambda path: PIXART.enable_prompt_cache(path),
    "cache of the hub": lambda path: impasto.AutoencoderKL.from_pretrained("a/b", cache_dir=path or 5),
}


def save(what: str, case: str) -> None:
    SAVES[what](NOT_PATHS[case])


@pytest.mark.parametrize("what", SAVES)
@pytest.mark.parametrize("case", NOT_PATHS)
def test_what_is_no_path(what: str, case: str) -> None:
    refused(run(save, what, case), "InputError", "a file or folder")


@pytest.mark.parametrize("device", ["foo", "cuda:99", 3, 10**30, None, 1.5, [], ""], ids=str)
def test_devices_of_models(pixart_folder: Path, device: Any) -> None:
    refused(run(load_onto, pixart_folder, device), "ImpastoError", str(device)[:20], "this machine has")


def load_onto(folder: Path, device: Any) -> None:
    impasto.AutoencoderKL.from_pretrained(folder, subfolder="vae", device=device)


SOLVERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "LCMScheduler",
    "FlowMatchEulerDiscreteScheduler",
)


def set_device(solver: str, device: Any) -> None:
    scheduler = getattr(impasto, solver)()
    before = scheduler.timesteps
    try:
        scheduler.set_timesteps(2, device=device)
    finally:
        assert scheduler.timesteps is before


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("device", ["foo", "cuda:99", 1.5])
def test_devices_of_schedules(solver: str, device: Any) -> None:
    refused(run(set_device, solver, device), "ImpastoError", str(device), "this machine has")


NOISE = torch.zeros(1, 4, 8, 8)
STEPS: dict[str, tuple[dict[str, Any], str]] = {
    "timestep of letters": ({"timestep": "t"}, "timestep"),
    "no timestep": ({"timestep": None}, "timestep"),
    "timestep of NaN": ({"timestep": math.nan}, "timestep"),
    "timestep of 5,000 digits": ({"timestep": HUGE}, "timestep"),
    "timestep of 300 digits": ({"timestep": 10**300}, "timestep"),
    "timestep True": ({"timestep": np.True_}, "timestep"),
    "tensor of NaN": ({"timestep": torch.tensor(math.nan)}, "timestep"),
    "tensor on meta": ({"timestep": torch.tensor(1.0, device="meta")}, "timestep"),
    "complex tensor": ({"timestep": torch.tensor(1j)}, "timestep"),
    "no sample": ({"sample": None}, "sample"),
    "sample of NumPy": ({"sample": NOISE.numpy()}, "sample"),
    "sample of integers": ({"sample": NOISE.long()}, "sample"),
    "sparse sample": ({"sample": NOISE.to_sparse()}, "sample"),
    "no prediction": ({"model_output": None}, "model_output"),
    "prediction of a list": ({"model_output": [0.0]}, "model_output"),
    "prediction of complex numbers": ({"model_output": NOISE.to(torch.complex64)}, "model_output"),
}


def take_step(solver: str, case: str) -> None:
    scheduler = getattr(impasto, solver)()
    scheduler.set_timesteps(2)
    scheduler.step(**{"model_output": NOISE, "timestep": scheduler.timesteps[0], "sample": NOISE} | STEPS[case][0])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", STEPS)
def test_steps(solver: str, case: str) -> None:
    refused(run(take_step, solver, case), "InputError", STEPS[case][1])


def test_flags_of_numpy_are_flags() -> None:
    config = impasto.DDIMScheduler(thresholding=np.False_, clip_sample=np.True_).config
    assert (config.thresholding, config.clip_sample) == (False, True)
    assert type(config.clip_sample) is bool


# --- weights that are broken, found where they do harm ---


def with_broken_weight(name: str, part: str, tensor: str, value: float) -> None:
    pipe = {"pixart": PIXART, "glm": GLM}[name]
    parameter = dict(pipe.components[part].named_parameters())[tensor]
    with torch.no_grad():
        parameter.flatten()[0] = value
    call = PIXART_CALL if name == "pixart" else GLM_CALL
    prior = {"prior_token_ids": None} if part == "vision_language_encoder" else {}
    pipe(**call | prior | {"output_type": "pt"})


BROKEN = {
    ("pixart", "text_encoder"): "encoder.final_layer_norm.weight",
    ("pixart", "transformer"): "proj_out.bias",
    ("pixart", "vae"): "decoder.conv_out.bias",
    ("glm", "text_encoder"): "encoder.final_layer_norm.weight",
    ("glm", "transformer"): "proj_out.bias",
    ("glm", "vision_language_encoder"): "model.language_model.norm.weight",
    ("glm", "vae"): "decoder.conv_out.bias",
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("name", "part"), BROKEN)
def test_broken_weights_are_named(name: str, part: str, value: float) -> None:
    tensor = BROKEN[name, part]
    refused(run(with_broken_weight, name, part, tensor, value), "CheckpointError", part, tensor)


OFFLOADS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")


def with_broken_weight_offloaded(offload: str, part: str, tensor: str) -> None:
    getattr(PIXART, offload)()
    with_broken_weight("pixart", part, tensor, math.nan)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_broken_weights_are_named_wherever_they_wait(offload: str, part: str) -> None:
    tensor = BROKEN["pixart", part]
    refused(run(with_broken_weight_offloaded, offload, part, tensor), "CheckpointError", part, tensor)


def overflowing() -> float:
    with torch.no_grad():
        PIXART.vae.decoder.conv_out.weight.fill_(3e38)
    return float(PIXART(**PIXART_CALL | {"output_type": "pt"}).images.isnan().any())


def test_an_overflow_of_good_weights_is_a_warning() -> None:
    outcome = run(overflowing)
    assert outcome.kind == "returned", outcome
    assert "hold NaN or infinite values" in outcome.stderr
