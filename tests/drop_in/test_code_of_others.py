"""Code that people put around and into models and pipelines runs as with diffusers, on the same tensors."""

from __future__ import annotations

import functools
import importlib
import json
import types
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import impasto

from .building import Make, comparable, difference, noise
from .idioms import CALL, glm_call, pixart_inputs, seed

Run = Callable[[ModuleType, Make], Any]
RUNS: list[Run] = []


def run(function: Run) -> Run:
    RUNS.append(function)
    return function


def images(pipe: Any, prompt: str = "a cat") -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, generator=seed(), **CALL).images


def seen(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keywords, with the shapes of tensors and the values of small ones."""
    return {n: (x.shape, x if x.numel() < 5 else None) if isinstance(x, Tensor) else x for n, x in arguments.items()}


def halved(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        return (function(*args, **options)[0] * 0.5,)

    return call


# --- around the transformer ---


@run
def a_hook_reads_keywords(lib: ModuleType, make: Make) -> Any:
    pipe, calls = make.sigma(), []
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append((a[0].shape, seen(k))), with_kwargs=True)
    found = images(pipe)
    for _, keywords in calls:
        keywords.pop("cross_attention_kwargs", None)
    return found, calls


@run
def a_hook_changes_what_comes_out(lib: ModuleType, make: Make) -> Any:
    pipe = make.alpha()
    pipe.transformer.register_forward_hook(lambda module, args, out: (out[0] * 0.9,))
    return images(pipe)


@run
def a_hook_is_removed_again(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    with pipe.transformer.register_forward_pre_hook(lambda module, args: (args[0] * 0.9, *args[1:])):
        changed = images(pipe)
    return changed, images(pipe)


@run
def forward_is_assigned(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    forward = pipe.transformer.forward

    @functools.wraps(forward)
    def louder(hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, **options: Any) -> Any:
        assert timestep.shape == (len(hidden_states),)
        return forward(hidden_states, encoder_hidden_states=encoder_hidden_states * 1.1, timestep=timestep, **options)

    pipe.transformer.forward = louder
    return images(pipe)


@run
def forward_is_a_method_that_is_assigned(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    cls = type(pipe.transformer)

    def forward(self: Any, hidden_states: Tensor, timestep: Tensor, **options: Any) -> Any:
        return cls.forward(self, hidden_states, timestep=timestep * 0.9, **options)

    pipe.transformer.forward = types.MethodType(forward, pipe.transformer)
    return images(pipe)


@run
def forward_is_replaced_on_the_class(lib: ModuleType, make: Make) -> Any:
    pipe, cls = make.sigma(), lib.PixArtTransformer2DModel
    forward, steps = cls.forward, []

    def counted(self: Any, *args: Any, **options: Any) -> Any:
        steps.append(options["timestep"].flatten()[0])
        return forward(self, *args, **options)

    plain, cls.forward = images(pipe), counted
    try:
        return plain, images(pipe), steps
    finally:
        cls.forward = forward


@run
def a_subclass_overrides_forward(lib: ModuleType, make: Make) -> Any:
    class Louder(lib.PixArtTransformer2DModel):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Any:
            return super().forward(hidden_states, encoder_hidden_states * 1.1, **options)

    pipe = make.sigma()
    pipe.transformer.__class__ = Louder
    return images(pipe)


@run
def a_hook_of_accelerate(lib: ModuleType, make: Make) -> Any:
    from accelerate.hooks import ModelHook, add_hook_to_module

    calls = []

    class Reader(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **options: Any) -> Any:
            calls.append(sorted(name for name, x in options.items() if isinstance(x, Tensor)))
            return args, options

    pipe = make.sigma()
    add_hook_to_module(pipe.transformer, Reader())
    return images(pipe), calls


class Wrapper(nn.Module):
    """The least that a pipeline needs of a transformer."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner, self.config = inner, inner.config

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Any:
        return self.inner(hidden_states, encoder_hidden_states=encoder_hidden_states * 1.1, **options)


@run
def a_module_around_the_transformer(lib: ModuleType, make: Make) -> Any:
    pipe = make.alpha()
    pipe.transformer = Wrapper(pipe.transformer)
    return images(pipe)


@run
def a_hook_on_glm_images_transformer(lib: ModuleType, make: Make) -> Any:
    pipe, calls = make.glm(), []
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append(seen(k)), with_kwargs=True)
    found = pipe(**glm_call()).images
    for call in calls:
        call.pop("kv_caches")
    return found, sorted(calls, key=lambda call: (-float(call["timestep"][1]), call["encoder_hidden_states"][0]))


@run
def forward_of_glm_image_is_assigned(lib: ModuleType, make: Make) -> Any:
    pipe = make.glm()
    pipe.transformer.forward = halved(pipe.transformer.forward)
    return pipe(**glm_call()).images


# --- inside of the transformer ---


@run
def a_hook_on_the_patches(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    tokens = pipe.transformer.pos_embed(noise(1, 4, 8, 6))
    pipe.transformer.pos_embed.register_forward_hook(lambda module, args, out: out * 0.5)
    return tokens, images(pipe)


@run
def a_hook_on_the_modulation(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    pipe.transformer.adaln_single.register_forward_hook(lambda module, args, out: (out[0] * 0.5, out[1]))
    return images(pipe)


@run
def attentions_by_their_class(lib: ModuleType, make: Make) -> Any:
    attention = importlib.import_module(f"{lib.__name__}.models.attention_processor").Attention
    return [name for name, module in make.pixart().named_modules() if isinstance(module, attention)]


# --- around the text encoder ---


@run
def a_text_encoder_without_a_config(lib: ModuleType, make: Make) -> Any:
    class Encoder(nn.Module):
        def __init__(self, inner: Any):
            super().__init__()
            self.inner, self.dtype, self.device = inner, torch.float32, torch.device("cpu")

        def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return (self.inner(ids, attention_mask=attention_mask)[0] * 1.1,)

    pipe = make.sigma()
    pipe.text_encoder = Encoder(pipe.text_encoder)
    return images(pipe)


@run
def a_lora_that_is_merged_by_hand(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    before = images(pipe)
    for name, module in pipe.text_encoder.named_modules():
        if name.endswith("SelfAttention.v"):
            module.weight.data += 0.5 * noise(*module.weight.shape, seed=3)
    return before, images(pipe)


@run
def hooks_on_the_text_encoder(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    before = images(pipe)
    with pipe.text_encoder.register_forward_hook(lambda module, args, out: (out[0] * 1.3,)):
        changed = images(pipe)
    return before, changed, images(pipe)


# --- methods of pipelines ---


@run
def prepare_latents_is_overridden(lib: ModuleType, make: Make) -> Any:
    class Quiet(lib.PixArtSigmaPipeline):  # type: ignore[misc]
        def prepare_latents(self, *args: Any, **options: Any) -> Any:
            return super().prepare_latents(*args, **options) * 0.5

    return images(Quiet(**make.sigma(scheduler=diffusers.EulerDiscreteScheduler()).components))


@run
def prepare_latents_is_assigned(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma()
    prepare = pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **options: prepare(*args, **options) * 0.5
    return images(pipe)


@run
def texts_are_prepared_otherwise(lib: ModuleType, make: Make) -> Any:
    class Dogs(lib.PixArtSigmaPipeline):  # type: ignore[misc]
        def _text_preprocessing(self, text: Any, clean_caption: bool = False) -> list[str]:
            return ["dog"] * (1 if isinstance(text, str) else len(text))

    return images(Dogs(**make.sigma().components))


@run
def the_steps_arguments_are_prepared_otherwise(lib: ModuleType, make: Make) -> Any:
    pipe = make.sigma(scheduler=make.scheduler("DDIMScheduler"))
    pipe.prepare_extra_step_kwargs = lambda generator, eta: {"eta": 1.0, "generator": generator}
    return images(pipe)


@run
def the_prior_is_replaced(lib: ModuleType, make: Make) -> Any:
    pipe, given = make.glm(prior=True), glm_call(num_images_per_prompt=2, latents=noise(2, 4, 8, 12))
    ids = given.pop("prior_token_ids")
    pipe.generate_prior_tokens = lambda prompt, height, width, **options: (ids + height // width, None, None)
    return pipe(**given).images


@run
def the_quoted_texts_are_replaced(lib: ModuleType, make: Make) -> Any:
    pipe = make.glm()
    pipe.get_glyph_texts = lambda prompt: [["open"]]
    return pipe(**glm_call(prompt="a")).images


@run
def glm_images_latents_are_replaced(lib: ModuleType, make: Make) -> Any:
    pipe = make.glm()
    prepare = pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **options: prepare(*args, **options) * 0.5
    return pipe(**glm_call()).images


@run
def methods_of_the_scheduler_are_assigned(lib: ModuleType, make: Make) -> Any:
    pipe, calls = make.sigma(), []
    set_timesteps, step = pipe.scheduler.set_timesteps, pipe.scheduler.step

    def spy(function: Any) -> Any:
        return lambda *args, **options: (calls.append(1), function(*args, **options))[1]

    pipe.scheduler.set_timesteps = spy(set_timesteps)
    first = images(pipe)
    pipe.scheduler.step = lambda output, *args, **options: step(output * 0.9, *args, **options)
    return first, images(pipe), len(calls)


@run
def a_subclass_with_an_argument_of_its_own(lib: ModuleType, make: Make) -> Any:
    class Extended(lib.PixArtSigmaPipeline):  # type: ignore[misc]
        def __init__(
            self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any, extra: Any = None
        ):
            super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
            self.extra = extra

    pipe = Extended(**make.sigma().components, extra=3)
    pipe.save_pretrained(make.folder)
    index = json.loads((Path(make.folder) / "model_index.json").read_text())
    loaded = Extended.from_pretrained(make.checkpoint(), extra=4)
    return pipe.extra, sorted(pipe.components), sorted(index), loaded.extra, images(pipe)


@run
def functions_next_to_the_pipelines(lib: ModuleType, make: Make) -> Any:
    places = ("pixart_alpha.pipeline_pixart_alpha", "pixart_alpha.pipeline_pixart_sigma", "glm_image")
    found = []
    for place in places:
        name = f"{lib.__name__}.pipelines.{place}" + (".pipeline_glm_image" if place == "glm_image" else "")
        retrieve, scheduler = importlib.import_module(name).retrieve_timesteps, make.scheduler()
        found += [retrieve(scheduler, 3), retrieve(scheduler, timesteps=[900, 500, 100], device="cpu")]
    return found


@run
def linear_layers_are_quantized_by_torch(lib: ModuleType, make: Make) -> Any:
    quantized = torch.ao.quantization.quantize_dynamic(make.pixart(), {nn.Linear}, torch.qint8)
    return quantized(**pixart_inputs()).sample.shape


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("one", RUNS, ids=lambda one: one.__name__)
def test_it_runs_as_with_diffusers(one: Run, tmp_path: Path) -> None:
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    results = []
    for lib in (impasto, diffusers):
        folder = tmp_path / lib.__name__
        folder.mkdir()
        results.append(comparable(one(lib, Make(lib, folder))))
    diffusers.utils.logging.set_verbosity(level)
    assert difference(*results) is None
