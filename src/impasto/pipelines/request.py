"""The request of a pipeline: the documented arguments, validated once. The later stages trust it.

The functions that read arguments raise InputError for those that cannot be used, or that contradict each other.

Shapes: P prompts, B images, C latent channels, h x w latent pixels, M text tokens, N image tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Generator, Tensor

from ..checks import MAX_STEPS, MAX_TOKENS, finite, shown, whole_number
from ..errors import InputError
from ..family import text_width
from . import inputs


class Texts(NamedTuple):
    """What to show, as texts or as embeddings, and what guidance steers away from."""

    prompts: Sequence[str]  # P; none if embeddings are given
    negatives: Sequence[str]  # P; none if embeddings are given, or without guidance
    prompt_embeds: Tensor | None  # [P, M, channels]
    prompt_attention_mask: Tensor | None  # [P, M]
    negative_prompt_embeds: Tensor | None
    negative_prompt_attention_mask: Tensor | None
    images_per_prompt: int
    length: int  # tokens of a prompt, at most
    clean: bool = False  # whether to clean captions

    @property
    def prompt_count(self) -> int:
        """P, also of embeddings."""
        return len(self.prompts if self.prompt_embeds is None else self.prompt_embeds)

    @property
    def to_encode(self) -> list[str]:
        """The prompts and the negative prompts that are not given as embeddings."""
        return [*self.prompts, *self.negatives]

    @property
    def of_glm_image(self) -> dict[str, Any]:
        """Arguments of ``encode_prompt`` of GLM-Image's pipeline."""
        return {
            "prompt": self.prompts or None,
            "do_classifier_free_guidance": bool(self.negatives) or self.negative_prompt_embeds is not None,
            "negative_prompt": self.negatives or None,
            "num_images_per_prompt": self.images_per_prompt,
            "prompt_embeds": self.prompt_embeds,
            "negative_prompt_embeds": self.negative_prompt_embeds,
            "max_sequence_length": self.length,
        }

    @property
    def of_pixart(self) -> dict[str, Any]:
        """Arguments of ``encode_prompt`` of the PixArt pipelines."""
        masks = ("prompt_attention_mask", "negative_prompt_attention_mask")
        return {**self.of_glm_image, **{n: getattr(self, n) for n in masks}, "clean_caption": self.clean}


class Schedule(NamedTuple):
    """The requested steps: their number, or custom timesteps or noise levels."""

    steps: int
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    skipped: int = 0  # steps that are left out at the beginning (image to image)

    @property
    def taken(self) -> int:
        """The number of steps that are taken."""
        return self.steps - self.skipped

    def at(self, strength: Any) -> Schedule:
        """Only the last steps, a fraction ``strength`` of all, but at least one."""
        taken = int(self.steps * finite("strength", strength, 0.0, 1.0))
        if taken < 1:
            least = math.ceil(1e4 / self.steps) / 1e4
            raise InputError(
                f"strength={strength} leaves none of {self.steps} steps; give at least {least:g}, or more steps"
            )
        return self._replace(skipped=self.steps - taken)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments for a scheduler's ``set_timesteps``."""
        own = {"timesteps": self.timesteps, "sigmas": self.sigmas}
        return {name: value for name, value in own.items() if value is not None} or {"num_inference_steps": self.steps}


def least_strength(steps: int) -> float:
    """The smallest strength that leaves one of so many steps."""
    return min(1.0, math.nextafter(1 / steps, 2.0))  # steps * (1 / steps) can be less than 1


_PROMPT_FIELDS = ("prompt", "prompt_embeds", "prompt_attention_mask")


@dataclass(frozen=True)
class Request:
    """A call of a pipeline."""

    texts: Texts
    shape: tuple[int, int, int, int]  # [B, C, h, w]
    schedule: Schedule
    guidance_scale: float
    generators: Generator | list[Generator] | None
    latents: Tensor | None
    output_type: str
    on_step_end: Callable[..., Any] | None
    on_step_end_names: tuple[str, ...]
    eta: float = 0.0
    callback: Callable[..., Any] | None = None
    callback_steps: int = 1
    final_size: tuple[int, int] | None = None  # to resize to, in pixels; None: as generated

    @property
    def denoising(self) -> dict[str, Any]:
        """Arguments of the denoising loop."""
        return {
            "num_inference_steps": self.schedule.steps,
            "timesteps": self.schedule.timesteps,
            "sigmas": self.schedule.sigmas,
            "guidance_scale": self.guidance_scale,
            "generator": self.generators,
        }


def read_texts(guided: bool, arguments: Mapping[str, Any], channels: int | str = "channels") -> Texts:
    """The prompts and negative prompts, as texts or embeddings, which have masks if the arguments have them.

    Args:
        guided: if False, negative prompts are checked and then left out.
        channels: of embeddings.
    """
    prompt, embeds, mask = (arguments.get(name) for name in _PROMPT_FIELDS)
    negative, negative_embeds, negative_mask = (arguments.get(f"negative_{name}") for name in _PROMPT_FIELDS)
    masked = "prompt_attention_mask" in arguments
    if prompt is not None and embeds is not None:
        raise InputError("prompt and prompt_embeds were both given; give one of them")
    if prompt is None and embeds is None:
        with_mask = " with prompt_attention_mask" if masked else ""
        raise InputError(f"there is nothing to generate: give prompt, or prompt_embeds{with_mask}")
    prompts = [] if prompt is None else inputs.list_of_texts("prompt", prompt)
    shape = None if embeds is None else inputs.check_embeds("prompt_embeds", embeds, mask, channels, masked)
    count = len(prompts) if shape is None else shape[0]
    if count == 0:
        raise InputError("prompt_embeds is empty; it needs one row for each prompt")
    negatives = inputs.list_of_texts("negative_prompt", negative or "", count)
    if negative_embeds is not None:
        if negative:
            raise InputError("negative_prompt and negative_prompt_embeds were both given; give one of them")
        found = inputs.check_embeds("negative_prompt_embeds", negative_embeds, negative_mask, channels, masked)
        if masked and shape is not None and found != shape:
            raise InputError(
                f"negative_prompt_embeds has shape {list(found)} and prompt_embeds {list(shape)}; make them equal"
            )
        if found[0] != count:
            raise InputError(f"negative_prompt_embeds has {found[0]} rows for {count} prompts; give one for each")
    if not guided:
        negatives, negative_embeds, negative_mask = [], None, None
    elif negative_embeds is not None:
        negatives = []
    each = inputs.images_per_prompt(arguments["num_images_per_prompt"], count)
    length = whole_number("max_sequence_length", arguments["max_sequence_length"], most=MAX_TOKENS)
    clean = bool(arguments.get("clean_caption"))
    return Texts(prompts, negatives, embeds, mask, negative_embeds, negative_mask, each, length, clean)


def read_pixart(
    pipe: Any, fields: Sequence[str], arguments: Mapping[str, Any], canvas: inputs.Canvas | None = None
) -> Request:
    """The arguments of a call of a PixArt pipeline.

    Args:
        fields: names of the embeddings that a callback may ask for.
        canvas: the sizes of the images; if None, from the arguments.
    """
    inputs.check_extra(arguments["kwargs"], arguments)
    config, factor = pipe._require("transformer").config, pipe.vae_scale_factor
    texts = read_texts(inputs.guidance(arguments["guidance_scale"]) > 1.0, arguments)
    callback = arguments["callback"]
    if callback is not None and not callable(callback):
        raise InputError(f"callback must be a function, not {shown(callback)}")
    if canvas is None:
        base, unit = config["sample_size"] * factor, config["patch_size"] * factor
        sides, binning = (arguments["height"], arguments["width"]), arguments["use_resolution_binning"]
        canvas = inputs.plan_canvas(*sides, base, unit, binning)
    request = Request(
        **shared_fields(pipe, fields, arguments, texts, canvas[:2], " (give both, or use_resolution_binning=False)"),
        eta=finite("eta", arguments["eta"], 0.0, 1.0),
        callback=callback,
        callback_steps=whole_number("callback_steps", arguments["callback_steps"]),
        final_size=canvas[2:] if canvas[:2] != canvas[2:] else None,
    )
    _check_text_width(pipe, texts)
    return request


def _check_text_width(pipe: Any, texts: Texts) -> None:
    """Check that the transformer takes embeddings as wide as those that are given and those to be encoded."""
    config, components = pipe.transformer.config, pipe.components
    expected = config.get("caption_channels") or config.get("cross_attention_dim")
    widths = {x.shape[-1] for x in (texts.prompt_embeds, texts.negative_prompt_embeds) if x is not None}
    if texts.to_encode and (pipe.prompt_cache is None or components["text_encoder"] is not None):
        missing = [name for name in ("tokenizer", "text_encoder") if components[name] is None]
        if missing:
            raise InputError(
                f"the pipeline has no {' and no '.join(missing)}: give prompt_embeds and negative_prompt_embeds with "
                f"their masks (with guidance_scale=1 the negative ones are not needed), or assign what is missing"
            )
        encoder_config = getattr(components["text_encoder"], "config", None)  # wrappers may have none
        if encoder_config is not None:
            widths.add(text_width(encoder_config) or expected)
    for width in widths:
        if expected is not None and width != expected:
            raise InputError(
                f"the text embeddings have {width} channels and the transformer takes {expected}; "
                f"use the text encoder that belongs to it"
            )


def shared_fields(
    pipe: Any,
    fields: Sequence[str],
    arguments: Mapping[str, Any],
    texts: Texts,
    size: tuple[int, int],
    advice: str = "",
    both: bool = False,
) -> dict[str, Any]:
    """The fields of ``Request`` that all pipelines read in the same way.

    Args:
        size: height and width in pixels of the images as they are generated.
        advice: how to use latents of another size.
        both: whether timesteps and sigmas may be given together.
    """
    batch, (height, width), factor = texts.prompt_count * texts.images_per_prompt, size, pipe.vae_scale_factor
    shape = (batch, pipe._require("transformer").config["in_channels"], height // factor, width // factor)
    latents, output_type, on_step_end = (arguments[n] for n in ("latents", "output_type", "callback_on_step_end"))
    if latents is not None:
        inputs.check_tensor("latents", latents, shape, f", of images generated at {height} x {width} pixels{advice}")
    names = inputs.check_result(output_type, on_step_end, arguments["callback_on_step_end_tensor_inputs"], fields)
    if output_type != "latent":
        pipe._require("vae")
    return {
        "texts": texts,
        "shape": shape,
        "schedule": read_schedule(pipe, arguments, both),
        "guidance_scale": inputs.guidance(arguments["guidance_scale"]),
        "generators": inputs.check_generator(arguments["generator"], batch),
        "latents": latents,
        "output_type": output_type,
        "on_step_end": on_step_end,
        "on_step_end_names": names,
    }


def read_schedule(pipe: Any, arguments: Mapping[str, Any], both: bool = False) -> Schedule:
    """The requested steps, if the pipeline's scheduler takes them.

    Args:
        both: whether timesteps and sigmas may be given together.
    """
    scheduler = pipe._require("scheduler")
    custom = {name: arguments[name] for name in ("timesteps", "sigmas") if arguments[name] is not None}
    if len(custom) == 2 and not both:
        raise InputError("timesteps and sigmas were both given; give one of them")
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    for name in custom:
        if name not in accepted:
            raise InputError(
                f"{type(scheduler).__name__} takes no {name}; leave them out, or use a scheduler that takes them, "
                f"such as DPMSolverMultistepScheduler"
            )
    levels = {name: inputs.levels(name, value) for name, value in custom.items()}
    counts = [len(values) for values in levels.values()]
    if len({*counts}) > 1:
        raise InputError(f"there are {counts[0]} timesteps and {counts[1]} sigmas; give as many of both")
    requested = arguments["num_inference_steps"]
    steps = counts[0] if counts else whole_number("num_inference_steps", requested, most=MAX_STEPS)
    timesteps, sigmas = levels.get("timesteps"), levels.get("sigmas")
    if not both and steps > 1 and sigmas is not None and sigmas[-1] == 0:  # where the last step ends: none of its own
        steps -= 1
    schedule = Schedule(steps, timesteps, sigmas)
    return schedule.at(arguments["strength"]) if "strength" in arguments else schedule
