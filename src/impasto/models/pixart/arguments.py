"""Checks of the arguments of PixArt's transformer that concern several of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...checkpoints.values import MOST_CHANNELS
from ...checks import shown
from ...errors import ConfigurationError


def check_arguments(name: str, given: Mapping[str, Any], use_additional_conditions: bool) -> None:
    """Check the constructor's arguments, each of which fits its type.

    Args:
        name: the class, for messages.
        given: the arguments.
        use_additional_conditions: as it was decided.

    Raises:
        ConfigurationError: a value that cannot be used, by name.
    """
    norm_type, attention_type = given["norm_type"], given["attention_type"]
    if norm_type != "ada_norm_single":
        raise ConfigurationError(f"{name}: norm_type {shown(norm_type)} is not PixArt's; use 'ada_norm_single'")
    if attention_type not in ("default", None):
        raise ConfigurationError(f"{name}: attention_type {shown(attention_type)} is not PixArt's; use 'default'")
    if given.get("num_vector_embeds"):
        raise ConfigurationError(
            f"{name}: num_vector_embeds={given['num_vector_embeds']} asks for discrete latents; leave it"
        )
    sample_size, patch_size = given["sample_size"], given["patch_size"]
    if sample_size < patch_size:
        raise ConfigurationError(f"{name}: sample_size {sample_size} is smaller than patch_size {patch_size}")
    if given["num_embeds_ada_norm"] is None:
        raise ConfigurationError(f"{name}: num_embeds_ada_norm cannot be None; the published models have 1000")
    if given["dropout"] == 1:
        raise ConfigurationError(f"{name}: dropout must be in [0, 1), not {given['dropout']!r}")
    width = given["num_attention_heads"] * given["attention_head_dim"]
    if width % 4 or width > MOST_CHANNELS:
        raise ConfigurationError(
            f"{name}: num_attention_heads * attention_head_dim is {width}; 2-D positions need a multiple of 4, "
            f"of at most {MOST_CHANNELS}"
        )
    if use_additional_conditions and width % 3:
        raise ConfigurationError(
            f"{name}: use_additional_conditions splits the width {width} in three; it must be a multiple of 3"
        )
    text_width = given["cross_attention_dim"]
    if given["caption_channels"] is not None and text_width not in (None, width):
        raise ConfigurationError(
            f"{name}: captions are projected to the width {width}, so cross_attention_dim cannot be "
            f"{text_width}; make them equal, or leave caption_channels None"
        )
