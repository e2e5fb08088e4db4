"""The facts of each model family, and components of one family that were put into another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
    """The facts in which the two differ, beside the configs of their parts."""

    name: str
    vae_scaling_factor: float
    text_tokens: int
    #: Whether the transformer may be told the size and the aspect ratio of the picture.
    micro_conditions: bool
    #: With a single step, take the scheduler's x_0 instead of its next sample (one-step models such as DMD).
    single_step_takes_original: bool


ALPHA = Family("PixArt-α", 0.18215, 120, micro_conditions=True, single_step_takes_original=True)
SIGMA = Family("PixArt-Σ", 0.13025, 300, micro_conditions=False, single_step_takes_original=False)


def mixtures(parts: Mapping[str, Any], family: Family) -> Iterator[str]:
    """What does not belong together among the parts of a pipeline of this family, a sentence each.

    Parts with values of their own, which are of neither family, are not spoken of.
    """
    other = SIGMA if family is ALPHA else ALPHA
    vae, transformer = parts["vae"], parts["transformer"]
    text_encoder, tokenizer = parts["text_encoder"], parts["tokenizer"]
    if vae is not None and vae.config.get("scaling_factor") == other.vae_scaling_factor:
        yield (
            f"the vae is that of {other.name} (scaling_factor {other.vae_scaling_factor}, and not "
            f"{family.vae_scaling_factor}); a transformer of {family.name} will draw noise with it"
        )
    if tokenizer is not None and tokenizer.model_max_length == other.text_tokens:
        yield (
            f"the tokenizer is that of {other.name} (made for {other.text_tokens} tokens); "
            f"{family.name} was trained with {family.text_tokens}"
        )
    if transformer is None:
        return
    config = transformer.config
    channels = config["in_channels"]
    if vae is not None and vae.config.get("latent_channels", channels) != channels:
        yield (
            f"the vae has {vae.config['latent_channels']} latent_channels and the transformer in_channels={channels}; "
            f"they do not belong together"
        )
    width = config.get("caption_channels")
    if text_encoder is not None and width is not None and text_encoder.config.d_model != width:
        yield (
            f"the text_encoder makes embeddings of {text_encoder.config.d_model} channels and the transformer takes "
            f"caption_channels={width}; they do not belong together"
        )
    if config.get("use_additional_conditions") and not family.micro_conditions:
        yield f"the transformer takes micro-conditions, as those of {other.name}; use that pipeline for it"


# --- GLM-Image's prior ---

#: Pixels to a token of the prior along a side; two of the transformer's.
PRIOR_PIXELS = 32


def small_grid(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of the small image that comes before one of so many rows and columns of tokens."""
    ratio = rows / columns
    return int(math.sqrt(ratio) * 16), int(math.sqrt(1 / ratio) * 16)


def tokens_to_generate(height: int, width: int, with_images: bool) -> int:
    """How many tokens the prior generates for an image, those of the small image included."""
    rows, columns = height // PRIOR_PIXELS, width // PRIOR_PIXELS
    return rows * columns + (0 if with_images else math.prod(small_grid(rows, columns)))
