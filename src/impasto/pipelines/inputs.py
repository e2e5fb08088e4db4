"""Checks of a pipeline's arguments, before anything is computed; each raises InputError and says what can be used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from ..checks import (
    MAX_CHARACTERS,
    MAX_GUIDANCE,
    MAX_IMAGES,
    MAX_SIDE,
    MAX_STEPS,
    finite,
    nearest,
    shown,
    text,
    whole_number,
)
from ..errors import InputError
from .images import check_output_type
from .resolution import bins_for, nearest_bin


class Canvas(NamedTuple):
    """Sizes in pixels: that at which an image is generated, and that to which it is resized afterwards."""

    height: int
    width: int
    final_height: int
    final_width: int


def plan_canvas(height: int | None, width: int | None, base: int, unit: int, binning: bool) -> Canvas:
    """Choose the sizes of an image.

    Args:
        height, width: as requested; ``base`` if None.
        base: the side of the training images; binning exists for 256, 512, 1024, 2048 and 2880.
        unit: the sides of a generated image must be multiples of it.
        binning: generate at the nearest training size.
    """
    final_height = base if height is None else whole_number("height", height, most=MAX_SIDE)
    final_width = base if width is None else whole_number("width", width, most=MAX_SIDE)
    bins = bins_for(base) if binning else None
    sides = (final_height, final_width) if bins is None else nearest_bin(final_height, final_width, bins)
    if sides[0] % unit or sides[1] % unit:
        nearest = [max(1, round(side / unit)) * unit for side in sides]
        raise InputError(
            f"height and width must be multiples of {unit}, not {sides[0]} x {sides[1]}; "
            f"the nearest size is {nearest[0]} x {nearest[1]}"
        )
    return Canvas(*sides, final_height, final_width)


def guidance(value: Any, name: str = "guidance_scale") -> float:
    return finite(name, value, -MAX_GUIDANCE, MAX_GUIDANCE)


def images_per_prompt(value: Any, prompts: int) -> int:
    """The number of images for each prompt; None means one."""
    return 1 if value is None else whole_number("num_images_per_prompt", value, most=max(1, MAX_IMAGES // prompts))


def check_result(
    output_type: Any, callback: Callable[..., Any] | None, names: Any, fields: Sequence[str]
) -> tuple[str, ...]:
    """Check the output type and the callback, and return the names of the tensors that the callback takes.

    Args:
        names: ``callback_on_step_end_tensor_inputs``; ``tensor_inputs`` of the callback takes precedence.
        fields: the names that are allowed in addition to latents.
    """
    check_output_type(output_type)
    if callback is not None and not callable(callback):
        raise InputError(f"callback_on_step_end must be a function, not {shown(callback)}")
    names = getattr(callback, "tensor_inputs", names)
    names = () if names is None else names
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InputError(f"callback_on_step_end_tensor_inputs must be a list of names, not {shown(names)}")
    for name in names:
        if name not in ("latents", *fields):
            known = ", ".join(("latents", *fields))
            raise InputError(f"callback_on_step_end_tensor_inputs has {shown(name)}; there are: {known}")
    return tuple(names)


def check_extra(kwargs: Mapping[str, Any], known: Iterable[str]) -> None:
    """Accept the one deprecated argument, and refuse all others.

    Args:
        known: the names of the arguments that there are.
    """
    for name, value in kwargs.items():
        if name == "cross_attention_kwargs":
            if value is None:
                continue
            raise InputError(
                "these pipelines take no cross_attention_kwargs: the strength of adapters is set by "
                "pipe.set_adapters(NAMES, WEIGHTS)"
            )
        if name != "mask_feature":
            hint = nearest(name, known, "see the documentation of this method")
            raise InputError(f"there is no argument {name!r}{hint}")
        warnings.warn("mask_feature is deprecated: it has no effect; leave it out", FutureWarning, stacklevel=3)


def list_of_texts(name: str, value: Any, count: int | None = None) -> list[str]:
    """One text or a list of them -> a list; one text is repeated ``count`` times."""
    if isinstance(value, str):
        return [text(name, value, MAX_CHARACTERS)] * (count or 1)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise InputError(f"{name} must be a text or a list of one or more texts, not {shown(value)}")
    if count is not None and len(value) != count:
        raise InputError(f"{name} has {len(value)} texts for {count} prompts; give one for all, or one for each")
    return [text(f"{name}[{i}]", one, MAX_CHARACTERS) for i, one in enumerate(value)]


def check_tensor(name: str, value: Any, shape: Sequence[int | str], advice: str = "", mask: bool = False) -> None:
    """Check that a tensor has this shape and finite floating-point values (or any real ones in a mask).

    Args:
        shape: a number must match; a word matches any number, and names it in the message.
        advice: appended to the shape in the message.
    """
    if not isinstance(value, Tensor):
        found = f"a {type(value).__name__}"
    elif value.ndim != len(shape) or any(isinstance(n, int) and n != m for n, m in zip(shape, value.shape)):
        found = f"{list(value.shape)}"
    elif not (value.is_floating_point() or (mask and not value.is_complex() and not value.is_quantized)):
        found = f"one of {value.dtype}"
    elif value.is_meta or value.layout != torch.strided:
        found = "one without values (meta)" if value.is_meta else f"one of layout {value.layout}"
    elif not bool(value.isfinite().all()):
        found = "one with NaN or infinite values"
    else:
        return
    kind = "tensor" if mask else "floating-point tensor"
    raise InputError(f"{name} must be a {kind} [{', '.join(map(str, shape))}]{advice}, not {found}")


def check_embeds(
    name: str, embeds: Any, mask: Any, channels: int | str = "channels", masked: bool = True
) -> tuple[int, ...]:
    """Check embeddings that are given in place of texts, and their mask if they need one; return their shape."""
    mask_name = name.removesuffix("embeds") + "attention_mask"
    check_tensor(name, embeds, ("prompts", "tokens", channels))
    if masked:
        if mask is None:
            raise InputError(f"{name} needs its {mask_name} [prompts, tokens], where 1 marks the tokens that count")
        check_tensor(mask_name, mask, list(embeds.shape[:2]), f" for {name} {list(embeds.shape)}", mask=True)
    return tuple(embeds.shape)


def corner(value: Any, name: str = "crops_coords_top_left") -> tuple[int, int]:
    """Check an offset in pixels from the top and from the left."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InputError(f"{name} must be two numbers of pixels, (top, left), not {shown(value)}")
    top, left = (whole_number(f"{name}[{i}]", side, least=0, most=MAX_SIDE) for i, side in enumerate(value))
    return top, left


def check_generator(generator: Any, batch: int) -> Generator | list[Generator] | None:
    """Check one generator, or a list with one for each image."""
    if generator is None or isinstance(generator, Generator):
        return generator
    if not isinstance(generator, list | tuple) or not all(isinstance(one, Generator) for one in generator):
        raise InputError(f"generator must be a torch.Generator or a list of them, not {shown(generator)}")
    if len(generator) != batch:
        raise InputError(f"{len(generator)} generators were given for {batch} images; give one, or one for each")
    return list(generator)


def levels(name: str, value: Any) -> list[float]:
    """The timesteps or sigmas of a custom schedule, which must be finite numbers of 0 or more; whole ones stay ints."""
    plain = isinstance(value, Tensor) and not value.is_meta and value.layout == torch.strided
    if isinstance(value, np.ndarray) or (plain and not value.is_complex()):
        value = value.tolist()
    one_row = isinstance(value, list | tuple | range)
    if not one_row:
        raise InputError(f"{name} must be a list of numbers, one for each step, not {shown(value)}")
    if len(value) == 0:
        raise InputError(f"{name} is empty; give one for each step, or None")
    whole_number(f"the number of {name}", len(value), most=MAX_STEPS)
    checked = [finite(f"{name}[{i}]", one, 0.0) for i, one in enumerate(value)]
    return [one if type(one) is int else number for one, number in zip(value, checked, strict=True)]
