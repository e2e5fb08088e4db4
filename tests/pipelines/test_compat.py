"""The rest of the documented surface of pipelines, against diffusers' where it has a result."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

import impasto
from impasto import DDIMScheduler, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline
from impasto.errors import InputError

from ..parity.test_pipelines import theirs_of
from ..tiny import tiny_pipeline
from ..tiny_glm import pipelines

CAPTION = "A Cat &amp; a dog http://cats.com <b>bold</b> #123 (2x3) @someone ... 10x20 free shipping"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["alpha", "sigma"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    ours = tiny_pipeline({"alpha": PixArtAlphaPipeline, "sigma": PixArtSigmaPipeline}[request.param])
    return ours, theirs_of(ours)


@pytest.fixture(scope="module")
def glm() -> tuple[Any, Any]:
    return pipelines()


def arguments(method: Any) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in inspect.signature(method).parameters.values()]


METHODS = (
    "check_inputs", "prepare_latents", "prepare_extra_step_kwargs", "enable_attention_slicing", "set_attention_slice",
    "disable_attention_slicing", "enable_xformers_memory_efficient_attention", "numpy_to_pil", "remove_all_hooks",
    "disable_xformers_memory_efficient_attention", "set_use_memory_efficient_attention_xformers",
    "maybe_free_model_hooks", "reset_device_map", "_text_preprocessing", "_clean_caption",
)  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_methods_take_the_same_arguments(pair: tuple[Any, Any], name: str) -> None:
    assert arguments(getattr(pair[0], name)) == arguments(getattr(pair[1], name))


@pytest.mark.parametrize("name", [name for name in METHODS if name[0] != "_" and "extra" not in name])
def test_methods_of_glm_image_take_the_same_arguments(glm: tuple[Any, Any], name: str) -> None:
    assert arguments(getattr(glm[0], name)) == arguments(getattr(glm[1], name))
    assert arguments(glm[0].get_glyph_texts) == arguments(glm[1].get_glyph_texts)


def test_group_offload_takes_the_same_arguments(pair: tuple[Any, Any]) -> None:
    ours, theirs = (arguments(pipe.enable_group_offload) for pipe in pair)
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    different = {name for (name, mine), (_, other) in zip(ours, theirs, strict=True) if mine != other}
    assert different == {"onload_device", "offload_device"}  # None: the accelerator; "cpu" rather than a device


def test_class_attributes(pair: tuple[Any, Any], glm: tuple[Any, Any]) -> None:
    for ours, theirs in (pair, glm):
        for name in ("model_cpu_offload_seq", "_optional_components", "_exclude_from_cpu_offload"):
            assert getattr(type(ours), name) == getattr(type(theirs), name), name
        assert ours.parameters == theirs.parameters == {}
        assert ours._execution_device == theirs._execution_device
    assert {*diffusers.GlmImagePipeline._callback_tensor_inputs} <= {*glm[0]._callback_tensor_inputs}
    for name in pair[0]._callback_tensor_inputs:
        pair[0](
            "a cat", num_inference_steps=1, output_type="latent", callback_on_step_end=lambda *_: None,
            callback_on_step_end_tensor_inputs=[name],
        )  # fmt: skip
    characters = "".join(map(chr, range(0x20, 0x2600)))
    assert pair[0].bad_punct_regex.sub("", characters) == pair[1].bad_punct_regex.sub("", characters)


def test_texts(pair: tuple[Any, Any], glm: tuple[Any, Any]) -> None:
    ours, theirs = pair
    assert ours._clean_caption(CAPTION) == theirs._clean_caption(CAPTION)
    for texts in (CAPTION, [CAPTION, " B "], (" A ",)):
        for clean in (True, False):
            assert ours._text_preprocessing(texts, clean) == theirs._text_preprocessing(texts, clean)
    for prompt in ("no quotes", ["'a' \"b\" 「c」 “d”", "x 'y'"]):
        assert glm[0].get_glyph_texts(prompt) == glm[1].get_glyph_texts(prompt)


def test_latents_are_those_of_the_reference(pair: tuple[Any, Any], glm: tuple[Any, Any]) -> None:
    """Noise scaled for a scheduler whose noise is not of variance 1."""
    euler = diffusers.EulerDiscreteScheduler()
    for pipe in pair:
        pipe.scheduler, pipe.kept = euler, pipe.scheduler
    try:
        for ours, theirs in (pair, glm):
            for given in (None, torch.randn(2, 4, 4, 6, generator=seeded(3))):
                call = (2, 4, 4 * ours.vae_scale_factor, 6 * ours.vae_scale_factor, torch.float32, torch.device("cpu"))
                found, expected = (pipe.prepare_latents(*call, seeded(), given) for pipe in (ours, theirs))
                assert torch.equal(found, expected)
            found, expected = (pipe.prepare_latents(*call, [seeded(), seeded(1)]) for pipe in (ours, theirs))
            assert torch.equal(found, expected)
            for pipe in (ours, theirs):
                with pytest.raises(ValueError, match="generators"):
                    pipe.prepare_latents(*call, [seeded()] * 3)
    finally:
        for pipe in pair:
            pipe.scheduler = pipe.kept


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_extra_arguments_of_a_step(scheduler: Any) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline, scheduler=scheduler())
    found, expected = (p.prepare_extra_step_kwargs(None, 0.5) for p in (pipe, theirs_of(pipe)))
    assert found == expected


EMBEDS = torch.zeros(1, 5, 32)
MASK = torch.ones(1, 5)
#: Positional arguments of check_inputs, and others.
CHECKS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "fine": (("a cat", 16, 16, "", 1), {}),
    "a list": ((["a cat", "a dog"], 16, 32, ["", "x"], 1), {}),
    "embeds": ((None, 16, 16, None, 1), {"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK}),
    "size": (("a cat", 15, 16, "", 1), {}),
    "callback_steps": (("a cat", 16, 16, "", 0), {}),
    "both": (("a cat", 16, 16, "", 1), {"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK}),
    "neither": ((None, 16, 16, "", 1), {}),
    "type": ((3, 16, 16, "", 1), {}),
    "no mask": ((None, 16, 16, None, 1), {"prompt_embeds": EMBEDS}),
    "shapes": (
        (None, 16, 16, None, 1),
        {
            "prompt_embeds": EMBEDS, "prompt_attention_mask": MASK,
            "negative_prompt_embeds": EMBEDS[:, :4], "negative_prompt_attention_mask": MASK[:, :4],
        },
    ),
}  # fmt: skip


def refused(call: Any) -> bool:
    try:
        call()
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("name", CHECKS)
def test_inputs_are_checked_alike(pair: tuple[Any, Any], name: str) -> None:
    given, others = CHECKS[name]
    found, expected = (refused(lambda p=pipe: p.check_inputs(*given, **others)) for pipe in pair)
    assert found == expected == (name not in ("fine", "a list", "embeds"))


def test_inputs_of_edits_are_checked() -> None:
    pipe = tiny_pipeline(impasto.PixArtSigmaImg2ImgPipeline)
    pipe.check_inputs("a cat", 16, 16, "", 1)
    with pytest.raises(InputError, match="callback_steps"):
        pipe.check_inputs("a cat", 16, 16, "", 0)


IDS = torch.zeros(1, 24, dtype=torch.long)
GLM_CHECKS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "fine": (('a "b"', 64, 96, None), {"prior_token_ids": IDS}),
    "fine, with a callback": (('a "b"', 64, 96, ["latents", "prompt_embeds"]), {"prior_token_ids": IDS}),
    "size": (('a "b"', 60, 96, None), {}),
    "names": (('a "b"', 64, 96, ["noise"]), {}),
    "both": (('a "b"', 64, 96, None), {"prompt_embeds": torch.zeros(1, 3, 16)}),
    "neither": ((None, 64, 96, None), {}),
    "no prior": ((None, 64, 96, None), {"prompt_embeds": torch.zeros(1, 3, 16)}),
    "half of an image": (('a "b"', 64, 96, None), {"prior_token_ids": IDS, "prior_token_image_ids": [IDS[0]]}),
}


@pytest.mark.parametrize("name", GLM_CHECKS)
def test_inputs_of_glm_image_are_checked_alike(glm: tuple[Any, Any], name: str) -> None:
    given, others = GLM_CHECKS[name]
    found, expected = (refused(lambda p=pipe: p.check_inputs(*given, **others)) for pipe in glm)
    assert found == expected == (not name.startswith("fine"))


def test_arrays_become_images(pair: tuple[Any, Any]) -> None:
    for shape in ((2, 5, 7, 3), (5, 7, 3), (1, 5, 7, 1)):
        array = np.random.default_rng(0).random(shape, dtype=np.float32)
        found, expected = (pipe.numpy_to_pil(array) for pipe in pair)
        assert [(x.mode, x.tobytes()) for x in found] == [(x.mode, x.tobytes()) for x in expected]


def test_switches_of_attention_change_nothing() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)

    def image() -> torch.Tensor:
        found: torch.Tensor = pipe("a cat", num_inference_steps=2, output_type="pt", generator=seeded()).images
        return found

    plain = image()
    for name, given in (
        ("enable_attention_slicing", ("max",)), ("set_attention_slice", (1,)), ("disable_attention_slicing", ()),
        ("enable_xformers_memory_efficient_attention", (None,)), ("disable_xformers_memory_efficient_attention", ()),
        ("set_use_memory_efficient_attention_xformers", (True,)), ("maybe_free_model_hooks", ()),
        ("remove_all_hooks", ()), ("reset_device_map", ()),
    ):  # fmt: skip
        assert getattr(pipe, name)(*given) is None
        assert torch.equal(image(), plain)


def test_the_autoencoder_of_every_pipeline_is_sliced_and_tiled(glm: tuple[Any, Any]) -> None:
    for pipe in (tiny_pipeline(PixArtAlphaPipeline), glm[0]):
        for what in ("slicing", "tiling"):
            getattr(pipe, f"enable_vae_{what}")()
            assert getattr(pipe.vae, f"use_{what}")
            getattr(pipe, f"disable_vae_{what}")()
            assert not getattr(pipe.vae, f"use_{what}")


# --- offloading ---


def image_of(pipe: Any) -> torch.Tensor:
    found: torch.Tensor = pipe("a cat", num_inference_steps=2, output_type="pt", generator=seeded()).images
    return found


def test_hooks_are_removed() -> None:
    from accelerate import cpu_offload

    pipe = tiny_pipeline(PixArtSigmaPipeline)
    plain = image_of(pipe)
    pipe.enable_sequential_cpu_offload(device="cpu")
    offloaded = pipe.placement
    pipe.remove_all_hooks()
    assert type(pipe.placement) is not type(offloaded)
    cpu_offload(pipe.transformer, torch.device("cpu"))
    assert any(hasattr(module, "_hf_hook") for module in pipe.transformer.modules())
    pipe.remove_all_hooks()
    assert not any(hasattr(module, "_hf_hook") for module in pipe.transformer.modules())
    torch.testing.assert_close(image_of(pipe), plain)  # weights in other places of memory round differently


@pytest.mark.parametrize(
    "options",
    [
        {"offload_type": "leaf_level", "use_stream": True},
        {"num_blocks_per_group": 2, "non_blocking": True, "record_stream": True, "use_stream": True},
        {"num_blocks_per_group": 1, "use_stream": True, "low_cpu_mem_usage": True, "exclude_modules": ["vae"]},
    ],
)
def test_groups_are_offloaded(options: dict[str, Any]) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    plain = image_of(pipe)
    pipe.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **options)
    assert torch.equal(image_of(pipe), plain)


def test_weights_wait_on_disk(tmp_path: Path) -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    plain, before = image_of(pipe), pipe.transformer.proj_out.weight
    for _ in range(2):  # the second time over files that are mapped
        pipe.enable_group_offload("cpu", offload_to_disk_path=tmp_path / "weights", exclude_modules="vae")
        names = sorted(path.name for path in (tmp_path / "weights").iterdir())
        assert names == ["text_encoder.safetensors", "transformer.safetensors"]
        torch.testing.assert_close(image_of(pipe), plain)
    assert pipe.transformer.proj_out.weight is before
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(tmp_path / "weights" / "transformer.safetensors") in mapped.read_text()


def test_the_kind_of_offloading_is_checked() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    with pytest.raises(InputError, match="block_level"):
        pipe.enable_group_offload("cpu", offload_type="blocks")


def test_without_a_device_map_nothing_is_reset() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline)
    pipe.enable_model_cpu_offload(device="cpu")
    placement = pipe.placement
    pipe.reset_device_map()
    assert pipe.placement is placement
    assert isinstance(pipe.transformer, nn.Module)
