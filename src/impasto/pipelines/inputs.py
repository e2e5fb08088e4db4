"""What a call of a text-to-image pipeline may be given: checked before anything is computed."""

from __future__ import annotations

import inspect
import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Generator, Tensor

from ..errors import InputError
from .image import OUTPUT_TYPES
from .resolution import bins_for, nearest_bin


class Canvas(NamedTuple):
    """Sizes in pixels: at which a picture is drawn, and to which it is brought afterwards."""

    height: int
    width: int
    final_height: int
    final_width: int


def plan_canvas(height: int | None, width: int | None, base: int, unit: int, binning: bool) -> Canvas:
    """Choose the sizes of a picture.

    Args:
        height, width: as asked for; ``base`` if None.
        base: the side of the pictures that the model was trained on; binning exists for 256, 512, 1024, 2048.
        unit: what the sides of a drawn picture have to be multiples of.
        binning: draw at the nearest size of the training.

    Raises:
        InputError: a size that cannot be drawn; the message has the nearest that can.
    """
    final_height = base if height is None else whole_number("height", height)
    final_width = base if width is None else whole_number("width", width)
    bins = bins_for(base) if binning else None
    drawn = (final_height, final_width) if bins is None else nearest_bin(final_height, final_width, bins)
    if drawn[0] % unit or drawn[1] % unit:
        nearest = [max(1, round(side / unit)) * unit for side in drawn]
        raise InputError(
            f"height and width must be multiples of {unit}, not {drawn[0]} x {drawn[1]}; "
            f"the nearest size is {nearest[0]} x {nearest[1]}"
        )
    return Canvas(*drawn, final_height, final_width)


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """``value`` as an int of at least ``least``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise InputError(f"{name} must be a whole number of {least} or more, not {value!r}")
    return number


def finite(name: str, value: Any) -> float:
    """``value`` as a finite float."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor) or not math.isfinite(value):
        raise InputError(f"{name} must be a finite number, not {value!r}")
    return float(value)


def check_output_type(output_type: Any) -> str:
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}")
    return str(output_type)


def check_extra(kwargs: Mapping[str, Any]) -> None:
    """Accept the one argument that once was, and refuse others."""
    for name in kwargs:
        if name != "mask_feature":
            raise InputError(f"there is no argument {name!r}; see the documentation of this method for those there are")
        warnings.warn("mask_feature is deprecated: it has no effect; leave it out", FutureWarning, stacklevel=3)


def list_of_texts(name: str, value: Any, count: int | None = None) -> list[str]:
    """One text or a list of them -> a list; one text stands for ``count``.

    Raises:
        InputError: neither a text nor a list of texts, an empty list, or a list of another length.
    """
    if isinstance(value, str):
        return [value] * (count or 1)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise InputError(f"{name} must be a text or a list of one or more texts, not {value!r:.80}")
    if count is not None and len(value) != count:
        raise InputError(f"{name} has {len(value)} texts for {count} prompts; give one for all, or one for each")
    return list(value)


def check_embeds(name: str, embeds: Any, mask: Any) -> tuple[int, ...]:
    """The shape of embeddings that are given in place of texts, with their mask."""
    mask_name = name.removesuffix("embeds") + "attention_mask"
    if not isinstance(embeds, Tensor) or embeds.ndim != 3 or not embeds.is_floating_point():
        found = f"shape {list(embeds.shape)}" if isinstance(embeds, Tensor) else f"a {type(embeds).__name__}"
        raise InputError(f"{name} must be a floating-point tensor [prompts, tokens, channels], not {found}")
    if not isinstance(mask, Tensor):
        raise InputError(f"{name} needs its {mask_name} [prompts, tokens], where 1 marks the tokens that count")
    if mask.shape != embeds.shape[:2]:
        raise InputError(
            f"{mask_name} has shape {list(mask.shape)}, and {name} {list(embeds.shape)}; "
            f"the mask must be {list(embeds.shape[:2])}"
        )
    return tuple(embeds.shape)


def count_prompts(
    prompt: Any,
    negative_prompt: Any,
    prompt_embeds: Any,
    prompt_attention_mask: Any,
    negative_prompt_embeds: Any,
    negative_prompt_attention_mask: Any,
) -> int:
    """Check all that says what to draw, and return the number of prompts.

    Raises:
        InputError: a kind or shape that cannot be used, or two arguments that contradict each other.
    """
    if prompt is not None and prompt_embeds is not None:
        raise InputError("prompt and prompt_embeds were both given; give one of them")
    if prompt_embeds is not None:
        shape = check_embeds("prompt_embeds", prompt_embeds, prompt_attention_mask)
        count = shape[0]
        if count == 0:
            raise InputError("prompt_embeds is empty; it needs one row for each prompt")
    elif prompt is None:
        raise InputError("there is nothing to draw: give prompt, or prompt_embeds with prompt_attention_mask")
    else:
        shape = None
        count = len(list_of_texts("prompt", prompt))
    if negative_prompt_embeds is None:
        if negative_prompt is not None:
            list_of_texts("negative_prompt", negative_prompt, count)
        return count
    if negative_prompt:
        raise InputError("negative_prompt and negative_prompt_embeds were both given; give one of them")
    negative = check_embeds("negative_prompt_embeds", negative_prompt_embeds, negative_prompt_attention_mask)
    if shape is not None and negative != shape:
        raise InputError(
            f"negative_prompt_embeds has shape {list(negative)} and prompt_embeds {list(shape)}; make them equal"
        )
    if negative[0] != count:
        raise InputError(f"negative_prompt_embeds has {negative[0]} rows for {count} prompts; give one for each")
    return count


def check_generator(generator: Any, batch: int) -> Generator | list[Generator] | None:
    """One generator, or a list with one for each picture."""
    if generator is None or isinstance(generator, Generator):
        return generator
    if not isinstance(generator, list | tuple) or not all(isinstance(one, Generator) for one in generator):
        raise InputError(f"generator must be a torch.Generator or a list of them, not {generator!r:.80}")
    if len(generator) != batch:
        raise InputError(f"{len(generator)} generators were given for {batch} pictures; give one, or one for each")
    return list(generator)


def check_latents(latents: Any, shape: tuple[int, ...], canvas: Canvas) -> None:
    if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
        found = list(latents.shape) if isinstance(latents, Tensor) else f"a {type(latents).__name__}"
        raise InputError(
            f"latents must be a tensor {list(shape)}, for pictures that are drawn at {canvas.height} x {canvas.width} "
            f"pixels, not {found}; give height and width, or use_resolution_binning=False"
        )


def count_steps(
    scheduler: Any, num_inference_steps: Any, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
) -> int:
    """The number of steps, after a check that the scheduler takes what is given.

    Raises:
        InputError: timesteps and sigmas, or what the scheduler does not take, or no step at all.
    """
    if timesteps is not None and sigmas is not None:
        raise InputError("timesteps and sigmas were both given; give one of them")
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    for name, value in (("timesteps", timesteps), ("sigmas", sigmas)):
        if value is None:
            continue
        if name not in accepted:
            raise InputError(
                f"{type(scheduler).__name__} takes no {name}; leave them out, or use a scheduler that takes them, "
                f"such as DPMSolverMultistepScheduler"
            )
        if len(value) == 0:
            raise InputError(f"{name} is empty; give one for each step, or None")
        return len(value)
    return whole_number("num_inference_steps", num_inference_steps)


def check_text_width(
    config: Mapping[str, Any], given: Sequence[Tensor], parts: Mapping[str, Any], encoder_needed: bool
) -> None:
    """Whether the transformer, by its config, takes the embeddings that are given and those that are to be made.

    Raises:
        InputError: it takes others, or the parts that make them are missing.
    """
    widths = {embeds.shape[-1] for embeds in given}
    if encoder_needed:
        missing = [name for name in ("tokenizer", "text_encoder") if parts[name] is None]
        if missing:
            raise InputError(
                f"the pipeline has no {' and no '.join(missing)}: give prompt_embeds and negative_prompt_embeds with "
                f"their masks (with guidance_scale=1 the negative ones are not needed), or assign what is missing"
            )
        widths.add(parts["text_encoder"].config.d_model)
    expected = config.get("caption_channels") or config.get("cross_attention_dim")
    for width in widths:
        if expected is not None and width != expected:
            raise InputError(
                f"the text embeddings have {width} channels and the transformer takes {expected}; "
                f"use the text encoder that belongs to it"
            )
