"""The request of a pipeline: the documented arguments, validated once. The later stages trust it.

Shapes: P prompts, B images, C latent channels, h x w latent pixels, M text tokens, N image tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Generator, Tensor

from ..checks import finite, shown, whole_number
from ..errors import InputError
from ..models.glm_image.prior import PriorTokens
from . import glm_image_inputs, inputs, limits

PRIOR_FIELDS = ("prior_token_ids", "prior_token_image_ids", "source_image_grid_thw")
PROMPT_FIELDS = ("prompt", "prompt_embeds", "prompt_attention_mask")


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

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments for a scheduler's ``set_timesteps``."""
        own = {"timesteps": self.timesteps, "sigmas": self.sigmas}
        return {name: value for name, value in own.items() if value is not None} or {"num_inference_steps": self.steps}


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


@dataclass(frozen=True)
class GlmImageRequest(Request):
    """A call of GLM-Image's pipeline."""

    size: tuple[int, int] = (0, 0)  # height and width in pixels
    images: list[list[Any]] | None = None  # the reference images of each prompt
    prior: PriorTokens | None = None  # tokens in place of the prior's
    corner: tuple[int, int] = (0, 0)  # top and left


def read_pixart_texts(guided: bool, arguments: Mapping[str, Any]) -> Texts:
    """The prompts and negative prompts, as texts or embeddings.

    Raises:
        InputError: a type or shape that cannot be used, or two arguments that contradict each other.
    """
    prompt, embeds, mask = (arguments[name] for name in PROMPT_FIELDS)
    negative, negative_embeds, negative_mask = (arguments[f"negative_{name}"] for name in PROMPT_FIELDS)
    if prompt is not None and embeds is not None:
        raise InputError("prompt and prompt_embeds were both given; give one of them")
    if prompt is None and embeds is None:
        raise InputError("there is nothing to generate: give prompt, or prompt_embeds with prompt_attention_mask")
    prompts = [] if prompt is None else inputs.list_of_texts("prompt", prompt)
    shape = None if embeds is None else inputs.check_embeds("prompt_embeds", embeds, mask)
    count = len(prompts) if shape is None else shape[0]
    if count == 0:
        raise InputError("prompt_embeds is empty; it needs one row for each prompt")
    negatives = inputs.list_of_texts("negative_prompt", negative or "", count)
    if negative_embeds is not None:
        if negative:
            raise InputError("negative_prompt and negative_prompt_embeds were both given; give one of them")
        found = inputs.check_embeds("negative_prompt_embeds", negative_embeds, negative_mask)
        if shape is not None and found != shape:
            raise InputError(
                f"negative_prompt_embeds has shape {list(found)} and prompt_embeds {list(shape)}; make them equal"
            )
        if found[0] != count:
            raise InputError(f"negative_prompt_embeds has {found[0]} rows for {count} prompts; give one for each")
    length = whole_number("max_sequence_length", arguments["max_sequence_length"], most=limits.TOKENS)
    each, _ = inputs.count_images(count, arguments["num_images_per_prompt"])
    if not guided:
        negatives, negative_embeds, negative_mask = [], None, None
    elif negative_embeds is not None:
        negatives = []
    clean = bool(arguments["clean_caption"])
    return Texts(prompts, negatives, embeds, mask, negative_embeds, negative_mask, each, length, clean)


def read_pixart(pipe: Any, fields: Sequence[str], arguments: Mapping[str, Any]) -> Request:
    """The arguments of a call of a PixArt pipeline.

    Args:
        fields: names of the embeddings that a callback may ask for.

    Raises:
        InputError: an argument that cannot be used.
    """
    inputs.check_extra(arguments["kwargs"])
    config, factor, components = pipe._require("transformer").config, pipe.vae_scale_factor, pipe.components
    texts = read_pixart_texts(inputs.guidance(arguments["guidance_scale"]) > 1.0, arguments)
    callback = arguments["callback"]
    if callback is not None and not callable(callback):
        raise InputError(f"callback must be a function, not {shown(callback)}")
    base, unit = config["sample_size"] * factor, config["patch_size"] * factor
    sides, binning = (arguments["height"], arguments["width"]), arguments["use_resolution_binning"]
    canvas = inputs.plan_canvas(*sides, base, unit, binning)
    request = Request(
        **_shared(pipe, fields, arguments, texts, canvas[:2], " (give both, or use_resolution_binning=False)"),
        eta=finite("eta", arguments["eta"], 0.0, 1.0),
        callback=callback,
        callback_steps=whole_number("callback_steps", arguments["callback_steps"]),
        final_size=canvas[2:] if canvas[:2] != canvas[2:] else None,
    )
    inputs.check_text_width(
        config,
        [x for x in (texts.prompt_embeds, texts.negative_prompt_embeds) if x is not None],
        components,
        encoder_needed=bool(texts.prompts or texts.negatives)
        and (pipe.prompt_cache is None or components["text_encoder"] is not None),
    )
    return request


def _shared(
    pipe: Any,
    fields: Sequence[str],
    arguments: Mapping[str, Any],
    texts: Texts,
    size: tuple[int, int],
    advice: str = "",
    both: bool = False,
) -> dict[str, Any]:
    """The fields that the requests of all families have.

    Args:
        size: height and width in pixels of the images as they are generated.
        advice: how to use latents of another size.
        both: whether timesteps and sigmas may be given together.
    """
    batch = (len(texts.prompts) if texts.prompt_embeds is None else len(texts.prompt_embeds)) * texts.images_per_prompt
    height, width = size
    factor = pipe.vae_scale_factor
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
    timesteps, sigmas = arguments["timesteps"], arguments["sigmas"]
    steps = arguments["num_inference_steps"]
    return Schedule(inputs.count_steps(pipe._require("scheduler"), steps, timesteps, sigmas, both), timesteps, sigmas)


def read_glm_image_texts(pipe: Any, prompts: Sequence[str], guided: bool, arguments: Mapping[str, Any]) -> Texts:
    """The texts whose glyphs are to be encoded, or their embeddings.

    Args:
        prompts: none if embeddings are given.

    Raises:
        InputError: a type or shape that cannot be used, or two arguments that contradict each other.
    """
    embeds, negative_embeds = arguments["prompt_embeds"], arguments["negative_prompt_embeds"]
    negative_prompt = arguments["negative_prompt"]
    count = len(prompts) or len(embeds)
    length = whole_number("max_sequence_length", arguments["max_sequence_length"], most=limits.TOKENS)
    images_per_prompt, _ = inputs.count_images(count, arguments["num_images_per_prompt"])
    negatives = inputs.list_of_texts("negative_prompt", negative_prompt or "", count)
    if guided and negative_prompt and negative_embeds is not None:
        raise InputError("negative_prompt and negative_prompt_embeds were both given; give one of them")
    glm_image_inputs.check_widths(embeds, negative_embeds, count, pipe.components["transformer"])
    if not guided or negative_embeds is not None:
        negatives = []
    return Texts(prompts, negatives, embeds, None, negative_embeds if guided else None, None, images_per_prompt, length)


def read_glm_image(pipe: Any, fields: Sequence[str], arguments: Mapping[str, Any]) -> GlmImageRequest:
    """The arguments of a call of GLM-Image's pipeline.

    Args:
        fields: names of the embeddings that a callback may ask for.

    Raises:
        InputError: an argument that cannot be used.
    """
    attention_kwargs = arguments["attention_kwargs"]
    if not isinstance(attention_kwargs, Mapping | None) or {*(attention_kwargs or ())} - {"scale"}:
        raise InputError(f"attention_kwargs must be None, as attention takes none, not {shown(attention_kwargs)}")
    prompts, count = glm_image_inputs.read_prompts(arguments["prompt"], arguments["prompt_embeds"])
    images = glm_image_inputs.images_of_prompts(arguments["image"], count)
    sides, default = (arguments["height"], arguments["width"]), pipe.default_sample_size * pipe.vae_scale_factor
    prompts, *planned = glm_image_inputs.plan_size(prompts, *sides, images, default)
    size = (int(planned[0]), int(planned[1]))  # NumPy integers pass the check, and stay NumPy integers
    texts = read_glm_image_texts(pipe, prompts, inputs.guidance(arguments["guidance_scale"]) > 1.0, arguments)
    shared = _shared(pipe, fields, arguments, texts, size, both=True)
    ids, image_ids, grids = (arguments[name] for name in PRIOR_FIELDS)
    prior, each = None, texts.images_per_prompt
    if ids is not None:
        config = pipe.transformer.config
        tokens = shared["shape"][2] * shared["shape"][3] // config["patch_size"] ** 2
        codes = config["prior_vq_quantizer_codebook_size"]
        prior = glm_image_inputs.given_prior(ids, image_ids, grids, images, count * each, each, tokens, codes)
    elif image_ids is not None or grids is not None:
        raise InputError(
            "prior_token_image_ids and source_image_grid_thw belong to prior_token_ids: give those too, or none"
        )
    elif not prompts:
        raise InputError("the prior needs a prompt: give prompt, or prior_token_ids with prompt_embeds")
    elif images is not None:
        images = [[glm_image_inputs.reference_image(one) for one in row] for row in images]
    needed = ["vae"] if images is not None else []
    if texts.prompts or texts.negatives:
        needed += ["tokenizer"] if pipe.prompt_cache is not None else ["tokenizer", "text_encoder"]
    for name in needed:
        pipe._require(name)
    corner = inputs.corner(arguments["crops_coords_top_left"])
    return GlmImageRequest(**shared, size=size, images=images, prior=prior, corner=corner)
