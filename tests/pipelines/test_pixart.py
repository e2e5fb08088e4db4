"""The PixArt pipelines: what they refuse, what drives their loop, what they compute only once."""

from __future__ import annotations

import inspect
import logging
import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from impasto.errors import InputError
from impasto.models.pixart.model import PixArtTransformer2DModel
from impasto.models.pixart.text import PixArtContext
from impasto.nn.machine import is_native
from impasto.pipelines.pixart import PixArtAlphaPipeline, PixArtSigmaPipeline, PromptEmbeds
from impasto.schedulers.ddim import DDIMScheduler
from impasto.schedulers.ddpm import DDPMScheduler
from impasto.schedulers.dpm_solver import DPMSolverMultistepScheduler

from ..tiny import tiny_pipeline, tiny_text_encoder, tiny_transformer, tiny_vae

CALL = {"prompt": "a red cube", "num_inference_steps": 3, "output_type": "latent"}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe: Any, **arguments: Any) -> Tensor:
    images: Tensor = pipe(**{**CALL, "generator": seeded(), **arguments}).images
    return images


@pytest.fixture
def pipe() -> PixArtSigmaPipeline:
    return tiny_pipeline(PixArtSigmaPipeline)


# --- the documented surface ---

SEEDS = {
    "__call__": """prompt=None negative_prompt='' num_inference_steps=20 timesteps=None sigmas=None guidance_scale=4.5
        num_images_per_prompt=1 height=None width=None eta=0.0 generator=None latents=None prompt_embeds=None
        prompt_attention_mask=None negative_prompt_embeds=None negative_prompt_attention_mask=None output_type='pil'
        return_dict=True callback=None callback_steps=1 clean_caption=True use_resolution_binning=True
        max_sequence_length={tokens}""",
    "encode_prompt": """do_classifier_free_guidance=True negative_prompt='' num_images_per_prompt=1 device=None
        prompt_embeds=None negative_prompt_embeds=None prompt_attention_mask=None negative_prompt_attention_mask=None
        clean_caption=False max_sequence_length={tokens}""",
}


@pytest.mark.parametrize("method", SEEDS)
@pytest.mark.parametrize(("cls", "tokens"), [(PixArtAlphaPipeline, 120), (PixArtSigmaPipeline, 300)])
def test_arguments_are_those_of_the_documents(cls: type[Any], tokens: int, method: str) -> None:
    parameters = list(inspect.signature(getattr(cls, method)).parameters.values())[1:]
    found = [f"{p.name}={p.default!r}" for p in parameters if p.default is not p.empty]
    expected = SEEDS[method].format(tokens=tokens).split()
    assert found[: len(expected)] == expected
    assert getattr(cls, method).__doc__


def test_documented_parts() -> None:
    for cls in (PixArtAlphaPipeline, PixArtSigmaPipeline):
        assert cls.component_names() == ["tokenizer", "text_encoder", "vae", "transformer", "scheduler"]


@pytest.mark.parametrize(("cls", "tokens"), [(PixArtAlphaPipeline, 120), (PixArtSigmaPipeline, 300)])
def test_encode_prompt_returns_the_documented_shapes(cls: type[Any], tokens: int) -> None:
    embeds, mask, negative, negative_mask = tiny_pipeline(cls).encode_prompt("cute cat")
    assert embeds.shape == negative.shape == (1, tokens, 32)
    assert mask.shape == negative_mask.shape == (1, tokens)
    assert 1 < int(mask.sum()) < 12
    assert int(negative_mask.sum()) == 1


def test_output_types(pipe: PixArtSigmaPipeline) -> None:
    (picture,) = draw(pipe, output_type="pil")
    array, tensor, latents = (draw(pipe, output_type=kind) for kind in ("np", "pt", "latent"))
    assert isinstance(picture, Image.Image)
    assert np.array_equal(np.asarray(picture), (array[0] * 255).round().astype(np.uint8))
    assert array.shape == (1, 16, 16, 3)
    assert tensor.shape == (1, 3, 16, 16)
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert latents.shape == (1, 4, 8, 8)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    assert torch.equal(pipe.image_processor.postprocess(decoded, output_type="pt"), tensor)
    plain = pipe(**CALL, generator=seeded(), return_dict=False)
    assert type(plain) is tuple
    assert torch.equal(plain[0], latents)


def test_prompt_and_negative_prompt_have_an_effect(pipe: PixArtSigmaPipeline) -> None:
    base = draw(pipe)
    for change in ({"prompt": "a cat"}, {"negative_prompt": "dark"}, {"guidance_scale": 2.0}):
        assert (draw(pipe, **change) - base).norm() / base.norm() > 1e-3


def test_no_gradients_are_kept(pipe: PixArtSigmaPipeline) -> None:
    embeds = pipe.encode_prompt("a cat")
    assert embeds.prompt_embeds.requires_grad  # as in diffusers: the caller decides
    call = {**dict(zip(PromptEmbeds._fields, embeds)), "prompt": None, "negative_prompt": None}
    assert not draw(pipe, **call, output_type="pt").requires_grad
    assert torch.is_grad_enabled()
    steps = pipe.denoise(torch.zeros(1, 4, 8, 8), embeds, num_inference_steps=2)
    first = next(steps)
    assert torch.is_grad_enabled()  # between the steps, the driver's own setting holds
    assert not first.latents.requires_grad


# --- bad input ---

EMBEDS = torch.zeros(2, 5, 32)
MASK = torch.ones(2, 5)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"prompt": None}, "nothing to generate"),
    "no prompts": ({"prompt": []}, "one or more texts"),
    "number": ({"prompt": 3}, "prompt must be a text"),
    "tuple": ({"prompt": ("a", "b")}, "prompt must be a text"),
    "list of numbers": ({"prompt": ["a", 3]}, "prompt must be a text"),
    "both": ({"prompt_embeds": EMBEDS, "prompt_attention_mask": MASK}, "both given"),
    "no mask": ({"prompt": None, "prompt_embeds": EMBEDS}, "needs its prompt_attention_mask"),
    "mask shape": (
        {"prompt": None, "prompt_embeds": EMBEDS, "prompt_attention_mask": torch.ones(2, 6)},
        r"prompt_attention_mask must be a tensor \[2, 5\].*not \[2, 6\]",
    ),
    "embeds shape": (
        {"prompt": None, "prompt_embeds": EMBEDS[0], "prompt_attention_mask": MASK},
        r"\[prompts, tokens, channels\], not \[5, 32\]",
    ),
    "embeds width": (
        {"prompt": None, "prompt_embeds": torch.zeros(2, 5, 16), "prompt_attention_mask": MASK, "guidance_scale": 1},
        "16 channels and the transformer takes 32",
    ),
    "no rows": (
        {"prompt": None, "prompt_embeds": EMBEDS[:0], "prompt_attention_mask": MASK[:0]},
        "prompt_embeds is empty",
    ),
    "negative shape": (
        {
            "prompt": None,
            "prompt_embeds": EMBEDS,
            "prompt_attention_mask": MASK,
            "negative_prompt_embeds": EMBEDS[:, :3],
            "negative_prompt_attention_mask": MASK[:, :3],
        },
        "make them equal",
    ),
    "negative rows": (
        {"negative_prompt_embeds": EMBEDS, "negative_prompt_attention_mask": MASK},
        "2 rows for 1 prompts",
    ),
    "negative mask": ({"negative_prompt_embeds": EMBEDS}, "needs its negative_prompt_attention_mask"),
    "negative both": (
        {"negative_prompt": "x", "negative_prompt_embeds": EMBEDS[:1], "negative_prompt_attention_mask": MASK[:1]},
        "both given",
    ),
    "negative list": ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "1 texts for 2 prompts"),
    "negative type": ({"negative_prompt": 3}, "negative_prompt must be a text"),
    "height": ({"height": 15}, r"multiples of 4, not 15 x 16; the nearest size is 16 x 16"),
    "width": ({"width": 1}, r"multiples of 4, not 16 x 1; the nearest size is 16 x 4"),
    "zero": ({"height": 0}, "height must be a whole number from 1 to 8192"),
    "fraction": ({"width": 16.0}, "width must be a whole number"),
    "nan": ({"guidance_scale": math.nan}, "guidance_scale must be a finite number"),
    "inf": ({"guidance_scale": math.inf}, "guidance_scale must be a finite number"),
    "no guidance": ({"guidance_scale": None}, "guidance_scale must be a finite number"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 10000"),
    "steps type": ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number"),
    "two schedules": ({"timesteps": [5], "sigmas": [0.5]}, "both given"),
    "no timesteps": ({"timesteps": []}, "timesteps is empty"),
    "images": ({"num_images_per_prompt": -1}, "num_images_per_prompt"),
    "callback_steps": ({"callback_steps": 0}, "callback_steps"),
    "callback_steps type": ({"callback_steps": None}, "callback_steps"),
    "callback tensors": ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise.*there are: latents, prompt_embeds"),
    "latents": (
        {"latents": torch.zeros(1, 4, 8, 9)},
        r"latents must be a floating-point tensor \[1, 4, 8, 8\].*not \[1, 4, 8, 9\]",
    ),
    "latents batch": ({"latents": torch.zeros(1, 4, 8, 8), "num_images_per_prompt": 2}, r"\[2, 4, 8, 8\]"),
    "latents type": ({"latents": [1.0]}, "not a list"),
    "generators": ({"generator": [torch.Generator()] * 2}, "2 generators were given for 1 images"),
    "generator": ({"generator": 3}, "generator must be a torch.Generator"),
    "output": ({"output_type": "png"}, "output_type must be one of pil, np, pt, latent"),
    "eta": ({"eta": math.nan}, "eta must be a finite number"),
    "length": ({"max_sequence_length": 0}, "max_sequence_length"),
    "unknown": ({"strength": 0.5}, "no argument 'strength'"),
    "misspelt": ({"guidance_scal": 4.5}, r"no argument 'guidance_scal'; did you mean 'guidance_scale'\?"),
    "strength of adapters": (
        {"cross_attention_kwargs": {"scale": 0.7}},
        r"set by pipe\.set_adapters\(NAMES, WEIGHTS\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_computed(
    pipe: PixArtSigmaPipeline, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was computed")

    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
        monkeypatch.setattr(part, "forward", forward)
    change, message = BAD[name]
    with pytest.raises(InputError, match=message):
        pipe(**{**CALL, **change})


@pytest.mark.parametrize("name", ["embeds", "transformer", "scheduler", "vae", "tokenizer"])
def test_missing_parts_are_named(pipe: PixArtSigmaPipeline, name: str) -> None:
    if name == "embeds":
        pipe.text_encoder = None
        with pytest.raises(InputError, match="no text_encoder: give prompt_embeds and negative_prompt_embeds"):
            pipe(**CALL)
        call = {**CALL, "prompt": None, "prompt_embeds": EMBEDS, "prompt_attention_mask": MASK}
        with pytest.raises(InputError, match="guidance_scale=1"):
            pipe(**call)
        assert pipe(**call, guidance_scale=1).images.shape == (2, 4, 8, 8)
        return
    delattr(pipe, name)
    with pytest.raises(InputError, match=name):
        pipe(**{**CALL, "output_type": "pil"})


def test_a_text_encoder_of_another_width() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline, text_encoder=tiny_text_encoder(d_model=16))
    with pytest.raises(InputError, match="16 channels and the transformer takes 32"):
        pipe(**CALL)


def test_a_scheduler_that_takes_no_timesteps() -> None:
    pipe = tiny_pipeline(PixArtSigmaPipeline, scheduler=DDIMScheduler())
    with pytest.raises(InputError, match="DDIMScheduler takes no timesteps"):
        pipe(**CALL, timesteps=[500])
    pipe.scheduler = DDPMScheduler()
    with pytest.raises(InputError, match="DDPMScheduler takes no sigmas"):
        pipe(**CALL, sigmas=[0.5])


def test_micro_conditions_are_not_sigmas(pipe: PixArtSigmaPipeline) -> None:
    pipe.transformer = tiny_transformer(use_additional_conditions=True)
    with pytest.raises(InputError, match=r"use PixArtAlphaPipeline\.from_pipe"):
        pipe(**CALL)
    assert draw(PixArtAlphaPipeline.from_pipe(pipe)).shape == (1, 4, 8, 8)


def test_an_argument_that_once_was(pipe: PixArtSigmaPipeline) -> None:
    with pytest.warns(FutureWarning, match="mask_feature"):
        found = draw(pipe, mask_feature=True)
    assert torch.equal(found, draw(pipe))
    with pytest.warns(FutureWarning, match="mask_feature"):
        pipe.encode_prompt("a cat", mask_feature=False)
    with pytest.raises(InputError, match="no argument 'lora_scale'"):
        pipe.encode_prompt("a cat", lora_scale=1.0)
    assert torch.equal(draw(pipe, cross_attention_kwargs=None), found)


def test_what_is_not_used_is_not_refused(pipe: PixArtSigmaPipeline) -> None:
    """Without guidance nothing negative has an effect; None is the empty negative prompt; "" is a prompt."""
    base = draw(pipe, guidance_scale=1.0)
    assert torch.equal(draw(pipe, guidance_scale=0.5, negative_prompt="dark"), base)
    assert torch.equal(draw(pipe, negative_prompt=None), draw(pipe))
    unconditional = draw(pipe, prompt="", guidance_scale=4.5)
    torch.testing.assert_close(unconditional, draw(pipe, prompt="", guidance_scale=1.0), rtol=1e-4, atol=1e-4)


# --- sizes ---


def test_binning_has_no_effect_where_there_are_no_bins(pipe: PixArtSigmaPipeline) -> None:
    for binning in (True, False):
        images = draw(pipe, height=8, width=20, use_resolution_binning=binning, output_type="pt")
        assert images.shape == (1, 3, 8, 20)


@pytest.mark.parametrize("side", [256, 512, 1024, 2048])
def test_sizes_of_the_training_are_binned(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(
        PixArtSigmaPipeline, transformer=tiny_transformer(sample_size=side // 8, use_additional_conditions=False)
    )
    pipe.vae = None
    monkeypatch.setattr(type(pipe), "vae_scale_factor", 8)
    drawn: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        pipe, "denoise", lambda noise, embeds, **_: drawn.append(tuple(noise.shape[2:])) or iter_nothing()
    )
    for height, width in ((None, None), (side // 2 - 1, side + 7)):
        pipe(**CALL, height=height, width=width)
    assert drawn[0] == (side // 8, side // 8)
    bins = {256: (176, 368), 512: (352, 704), 1024: (704, 1408), 2048: (1408, 2816)}
    assert drawn[1] == tuple(x // 8 for x in bins[side])


def iter_nothing() -> Any:
    yield from ()


# --- noise ---


def test_each_picture_has_its_own_noise_whatever_the_batch(pipe: PixArtSigmaPipeline) -> None:
    prompts = ["a red cube", "a cat", "a blue sphere on top of a wall"]
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    together = draw(pipe, prompt=prompts, generator=[seeded(i) for i in range(3)], eta=1.0)
    for i, prompt in enumerate(prompts):
        alone = draw(pipe, prompt=prompt, generator=[seeded(i)], eta=1.0)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_one_generator_is_one_draw_over_the_batch(pipe: PixArtSigmaPipeline) -> None:
    noise = torch.randn(2, 4, 8, 8, generator=seeded(3))
    found = draw(pipe, num_images_per_prompt=2, generator=seeded(3))
    assert torch.equal(found, draw(pipe, num_images_per_prompt=2, latents=noise))
    assert not torch.equal(found[0], found[1])


def test_a_deterministic_call_leaves_the_global_random_state_alone(pipe: PixArtSigmaPipeline) -> None:
    before = torch.get_rng_state()
    draw(pipe)
    assert torch.equal(torch.get_rng_state(), before)
    first, second = pipe(**CALL).images, pipe(**CALL).images  # without a generator, the global one
    assert not torch.equal(first, second)


def test_pictures_of_a_prompt_follow_each_other(pipe: PixArtSigmaPipeline) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=seeded()).repeat(4, 1, 1, 1)
    found = draw(pipe, prompt=["a cat", "a red cube"], num_images_per_prompt=2, latents=noise)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])
    assert (found[1] - found[2]).norm() > 1e-2


# --- the loop and its drivers ---


def test_callback(pipe: PixArtSigmaPipeline) -> None:
    seen: list[tuple[int, int, Tensor]] = []
    final = draw(pipe, num_inference_steps=5, callback_steps=2, callback=lambda *state: seen.append(state))
    assert [step for step, _, _ in seen] == [0, 2, 4]
    assert [int(t) for _, t, _ in seen] == [int(t) for t in pipe.scheduler.timesteps[::2]]
    assert torch.equal(seen[-1][2], final)


def test_callback_on_step_end_may_change_the_latents(pipe: PixArtSigmaPipeline) -> None:
    seen: list[int] = []

    def double(owner: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert owner is pipe
        assert list(tensors) == ["latents"]
        seen.append(step)
        return {"latents": tensors["latents"] * (2.0 if step == 2 else 1.0)}

    torch.testing.assert_close(draw(pipe, callback_on_step_end=double), 2.0 * draw(pipe))
    assert seen == [0, 1, 2]
    assert not torch.equal(
        draw(pipe, callback_on_step_end=lambda *_: None), draw(pipe, callback_on_step_end=lambda *a: halved(*a))
    )


def halved(_: Any, __: int, ___: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"latents": tensors["latents"] / 2}


def test_callback_on_step_end_may_change_the_embeddings(pipe: PixArtSigmaPipeline) -> None:
    with torch.no_grad():
        other = pipe.encode_prompt("a cat", clean_caption=True)
    names = ["prompt_embeds", "prompt_attention_mask"]

    def swap(_: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert list(tensors) == names
        return {name: getattr(other, name) for name in names} if step == 0 else {}

    pipe.scheduler = DDIMScheduler(clip_sample=False)
    call = {"num_inference_steps": 2, "guidance_scale": 3.0}
    found = draw(pipe, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=names, **call)
    # By hand: the first step with one prompt, the second with the other.
    with torch.no_grad():
        first = pipe.encode_prompt(CALL["prompt"], clean_caption=True)
    noise = torch.randn(1, 4, 8, 8, generator=seeded())
    step = next(pipe.denoise(noise, first, **call))
    steps = pipe.denoise(noise, other, **call)
    next(steps).latents = step.latents
    assert torch.equal(found, next(steps).latents)
    with pytest.raises(InputError, match="returned 'noise'"):
        draw(pipe, callback_on_step_end=lambda *_: {"noise": noise})


def test_interrupt(pipe: PixArtSigmaPipeline) -> None:
    steps: list[Tensor] = []

    def stop(owner: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(tensors["latents"])
        owner.interrupt = step == 1
        return {}

    found = draw(pipe, num_inference_steps=5, callback_on_step_end=stop)
    assert len(steps) == 2
    assert torch.equal(found, steps[-1])
    assert pipe.interrupt  # the last call's
    draw(pipe, num_inference_steps=5, callback_on_step_end=lambda *_: {})
    assert not pipe.interrupt


def test_the_loop_is_the_drivers(pipe: PixArtSigmaPipeline) -> None:
    with torch.no_grad():
        embeds = pipe.encode_prompt("a red cube", clean_caption=True)
    noise = torch.randn(1, 4, 8, 8, generator=seeded())
    steps = list(pipe.denoise(noise, embeds, num_inference_steps=3))
    assert [step.index for step in steps] == [0, 1, 2]
    assert [int(step.timestep) for step in steps] == pipe.scheduler.timesteps.tolist()
    assert torch.equal(steps[-1].latents, draw(pipe))
    picture = pipe.image_processor.postprocess(pipe.decode(steps[-1].latents), "pt")
    assert torch.equal(picture, draw(pipe, output_type="pt"))

    replaced = pipe.denoise(noise, embeds, num_inference_steps=2)
    next(replaced).latents = torch.zeros_like(noise)
    other = next(replaced).latents
    assert not torch.equal(other, list(pipe.denoise(noise, embeds, num_inference_steps=2))[-1].latents)


def test_custom_timesteps_and_sigmas(pipe: PixArtSigmaPipeline) -> None:
    seen: list[int] = []
    draw(pipe, timesteps=[800, 300, 20], callback=lambda step, t, latents: seen.append(int(t)))
    assert seen == [800, 300, 20]
    draw(pipe, sigmas=[5.0, 1.0], callback=lambda step, t, latents: seen.append(step))
    assert seen[3:] == [0, 1]


def test_one_step_models_give_the_original() -> None:
    """α takes the scheduler's x_0 in its only step; Σ, like the reference, its next sample."""
    scheduler = DDPMScheduler(clip_sample=False)
    alpha = tiny_pipeline(PixArtAlphaPipeline, scheduler=scheduler)
    call = {"timesteps": [400], "guidance_scale": 1.0}
    found = draw(alpha, **call)
    noise = torch.randn(1, 4, 8, 8, generator=seeded())
    with torch.no_grad():
        embeds = alpha.encode_prompt(CALL["prompt"], False, clean_caption=True)
        predicted = alpha.transformer(
            noise, embeds.prompt_embeds, torch.tensor([400]), encoder_attention_mask=embeds.prompt_attention_mask
        ).sample[:, :4]
    bar = scheduler.alphas_cumprod[400]
    torch.testing.assert_close(found, (noise - (1 - bar).sqrt() * predicted) / bar.sqrt(), rtol=1e-4, atol=1e-4)
    # A scheduler whose last sample is not x_0.
    alpha.scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    found = draw(alpha, num_inference_steps=1)
    assert not torch.allclose(found, draw(PixArtSigmaPipeline.from_pipe(alpha), num_inference_steps=1))
    alpha.scheduler = DPMSolverMultistepScheduler()  # one that returns no x_0
    assert torch.isfinite(draw(alpha, num_inference_steps=1)).all()


# --- what does not change is computed once ---


def test_invariants_are_computed_once(pipe: PixArtSigmaPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[str, int] = {}

    def count(part: nn.Module, method: str) -> None:
        original = getattr(part, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[method] = counts.get(method, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(part, method, counted)

    count(pipe.transformer, "encode_context")
    count(pipe.transformer, "modulate")
    count(pipe.transformer, "denoise")
    draw(pipe, num_inference_steps=6)
    assert counts == {"encode_context": 2, "modulate": 1, "denoise": 6}


def lengths_of(text_encoder: Any) -> list[int]:
    """The numbers of tokens that an encoder is run on. With a hook, nothing that it computes would be kept."""
    lengths: list[int] = []

    class Counting(type(text_encoder)):  # type: ignore[misc]
        def forward(self, ids: Tensor, **options: Any) -> Any:
            lengths.append(ids.shape[1])
            return super().forward(ids, **options)

    text_encoder.__class__ = Counting
    return lengths


def test_padding_reaches_neither_t5_nor_attention(pipe: PixArtSigmaPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, keys, denoise = lengths_of(pipe.text_encoder), set[int](), pipe.transformer.denoise

    def denoise_and_count(latents: Tensor, context: PixArtContext, *others: Any) -> Any:
        keys.add(tokens(context))
        return denoise(latents, context, *others)

    monkeypatch.setattr(pipe.transformer, "denoise", denoise_and_count)

    def tokens(context: PixArtContext) -> int:
        assert context.layers is not None
        unconditional, conditional = (row.values for row in context.layers[0])  # [heads * tokens, D]
        assert len(unconditional) == 1  # the empty prompt is a constant
        return len(conditional) // pipe.transformer.transformer_blocks[0].attn2.heads

    draw(pipe, prompt="a cat")
    assert max(lengths) < 8
    assert keys == {max(lengths)}
    lengths.clear()
    draw(pipe, prompt="a dog")
    assert len(lengths) == 1  # the empty negative prompt was kept


def test_a_compiled_transformer_is_what_runs(pipe: PixArtSigmaPipeline) -> None:
    expected = draw(pipe)
    calls = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return graph(*args)

        return run

    pipe.transformer = torch.compile(pipe.transformer, backend=backend, fullgraph=True)
    assert (draw(pipe) - expected).norm() <= 1e-5 * expected.norm()  # graphs have other kernels
    assert calls == 3
    del pipe.transformer


def test_no_negative_prompt_is_the_empty_one(pipe: PixArtSigmaPipeline) -> None:
    """And not the word, as in diffusers."""
    assert torch.equal(draw(pipe, negative_prompt=None), draw(pipe, negative_prompt=""))
    assert not torch.equal(draw(pipe, negative_prompt=None), draw(pipe, negative_prompt="none"))


def test_the_scale_factor_is_the_autoencoders(pipe: PixArtSigmaPipeline) -> None:
    with pytest.raises(InputError, match=r"assign another one to pipe\.vae"):
        pipe.vae_scale_factor = 4


def test_invariants_are_computed_once_although_the_weights_are_streamed(pipe: PixArtSigmaPipeline) -> None:
    """What moves the weights of a text encoder is ours, and no reason to encode the empty prompt again."""
    pipe.enable_sequential_cpu_offload(device="cpu")
    lengths = lengths_of(pipe.text_encoder)
    draw(pipe)
    draw(pipe)
    assert lengths.count(1) == 1


def test_the_class_of_the_model_is_kept_by_a_subclass(pipe: PixArtSigmaPipeline) -> None:
    class Louder(PixArtTransformer2DModel):
        def denoise(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2.0 * super().denoise(*args, **kwargs)

    before = draw(pipe)
    pipe.transformer.__class__ = Louder
    assert not torch.allclose(draw(pipe), before)


# --- text ---


def test_truncated_text_is_quoted(pipe: PixArtSigmaPipeline, caplog: pytest.LogCaptureFixture) -> None:
    draw(pipe, prompt="a red cube on top of a blue sphere", max_sequence_length=6)
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 1
    assert "sphere" in messages[0]


def test_captions_are_cleaned_by_default_in_the_call_only(pipe: PixArtSigmaPipeline) -> None:
    messy, clean = "A CAT http://x.com &amp; dog", "a cat dog"
    assert torch.equal(draw(pipe, prompt=messy), draw(pipe, prompt=pipe_clean(messy), clean_caption=False))
    assert not torch.equal(draw(pipe, prompt=messy, clean_caption=False), draw(pipe, prompt=messy))
    raw, cleaned = (pipe.encode_prompt(messy, clean_caption=x)[0] for x in (False, True))
    assert raw.shape == cleaned.shape
    assert not torch.equal(raw, cleaned)
    assert not torch.equal(draw(pipe, prompt=clean), draw(pipe, prompt=messy, clean_caption=False))


def pipe_clean(text: str) -> str:
    from impasto.pipelines.cleaning import clean_caption

    return clean_caption(clean_caption(text))


# --- the autoencoder ---


class Echo(nn.Module):
    """An autoencoder that returns what it is given, and remembers its dtype."""

    config: ClassVar[dict[str, Any]] = {"block_out_channels": [1, 1], "scaling_factor": 0.5}

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = {**type(self).config, **config}  # type: ignore[misc]
        self.seen: list[torch.dtype] = []

    def decode(self, z: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        assert z.dtype == self.weight.dtype
        self.seen.append(z.dtype)
        return (z,)


def test_latents_are_brought_to_the_scale_of_the_autoencoder(pipe: PixArtSigmaPipeline) -> None:
    latents = torch.randn(2, 4, 8, 8)
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    column = {"mean": torch.tensor(mean)[:, None, None], "std": torch.tensor(std)[:, None, None]}
    for config, expected in (
        ({}, latents / 0.5),
        ({"shift_factor": 0.3}, latents / 0.5 + 0.3),
        ({"latents_mean": mean, "latents_std": std}, latents / 0.5 * column["std"] + column["mean"]),
        ({"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None}, latents),
    ):
        pipe.vae = Echo(**config)
        torch.testing.assert_close(pipe.decode(latents), expected)


def test_an_autoencoder_that_overflows_in_float16_decodes_in_float32(pipe: PixArtSigmaPipeline) -> None:
    latents = torch.randn(1, 4, 8, 8).half()
    for force, dtype, expected in (
        (True, torch.float16, torch.float32),
        (False, torch.float16, torch.float16),
        (True, torch.bfloat16, torch.bfloat16),
    ):
        pipe.vae = Echo(force_upcast=force).to(dtype)
        pipe.decode(latents)
        assert pipe.vae.seen == [expected if is_native(dtype) else torch.float32]
        assert pipe.vae.weight.dtype == dtype


def test_slicing(pipe: PixArtSigmaPipeline) -> None:
    expected = draw(pipe, num_images_per_prompt=3, output_type="pt")
    pipe.enable_vae_slicing()
    assert pipe.vae.use_slicing
    torch.testing.assert_close(draw(pipe, num_images_per_prompt=3, output_type="pt"), expected)
    pipe.disable_vae_slicing()
    assert not pipe.vae.use_slicing
    pipe.vae = None
    with pytest.raises(InputError, match="needs the vae"):
        pipe.enable_vae_slicing()


def test_the_scale_of_the_autoencoder_is_that_of_the_one_in_use(pipe: PixArtSigmaPipeline) -> None:
    assert pipe.vae_scale_factor == 2
    pipe.vae = tiny_vae(levels=4)
    assert pipe.vae_scale_factor == 8
    del pipe.vae
    assert pipe.vae_scale_factor == 2  # of the one it was made with
    assert tiny_pipeline(PixArtSigmaPipeline, vae=None).vae_scale_factor == 8
