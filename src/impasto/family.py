"""The facts of each model family, and the detection of components from different families."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
    """What distinguishes a family apart from the configs of its components."""

    name: str
    #: None: the autoencoder has a mean and a standard deviation for each latent channel instead.
    vae_scaling_factor: float | None
    #: The default of ``max_sequence_length``.
    text_tokens: int
    #: The defaults of ``num_inference_steps`` and ``guidance_scale``.
    steps: int
    guidance_scale: float
    #: Whether the transformer may be conditioned on the size of the image.
    micro_conditions: bool
    #: With a single step, take the scheduler's x_0 instead of its next sample (one-step models such as DMD).
    single_step_takes_original: bool


ALPHA = Family("PixArt-α", 0.18215, 120, 20, 4.5, micro_conditions=True, single_step_takes_original=True)
SIGMA = Family("PixArt-Σ", 0.13025, 300, 20, 4.5, micro_conditions=False, single_step_takes_original=False)
GLM_IMAGE = Family("GLM-Image", None, 2048, 50, 1.5, micro_conditions=True, single_step_takes_original=False)

#: The class names of early PixArt repositories -> those that the classes have now.
ALIASES = {"Transformer2DModel": "PixArtTransformer2DModel"}
#: The names of the lists of repeated blocks in models, their text encoders included.
BLOCK_LISTS = ("transformer_blocks", "blocks", "block", "layers")


def pixels_per_latent(vae: Mapping[str, Any] | None) -> int:
    """Along a side, by the config of the autoencoder; the usual 8 if there is none, or if it does not say."""
    levels = None if vae is None else vae.get("block_out_channels")
    return 8 if levels is None else int(2 ** (len(levels) - 1))


def text_width(config: Any) -> int | None:
    """The channels of a text encoder's embeddings, by its config; None if it does not say."""
    width = getattr(config, "d_model", None) or getattr(config, "hidden_size", None)
    return None if width is None else int(width)


def family_of(pipeline_class_name: str) -> Family:
    """The family of a pipeline class, by its name; PixArt-Σ for the name of any other class."""
    prefixes = {"PixArtAlpha": ALPHA, "GlmImage": GLM_IMAGE}
    return next((family for prefix, family in prefixes.items() if pipeline_class_name.startswith(prefix)), SIGMA)


def mixtures(components: Mapping[str, Any], family: Family) -> Iterator[str]:
    """A sentence for each component of a PixArt pipeline that does not belong to this family or to the others.

    Components with values that are of neither PixArt family are not mentioned.
    """
    other = SIGMA if family is ALPHA else ALPHA
    vae, transformer = components["vae"], components["transformer"]
    text_encoder, tokenizer = components["text_encoder"], components["tokenizer"]
    if vae is not None and vae.config.get("scaling_factor") == other.vae_scaling_factor:
        yield (
            f"the vae is that of {other.name} (scaling_factor {other.vae_scaling_factor}, and not "
            f"{family.vae_scaling_factor}); a transformer of {family.name} will generate noise with it"
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
    width, encoded = config.get("caption_channels"), None if text_encoder is None else text_width(text_encoder.config)
    if None not in (width, encoded) and encoded != width:
        yield (
            f"the text_encoder computes embeddings of {encoded} channels and the transformer takes "
            f"caption_channels={width}; they do not belong together"
        )
    if config.get("use_additional_conditions") and not family.micro_conditions:
        yield f"the transformer takes micro-conditions, like that of {other.name}; use that pipeline for it"


# --- GLM-Image's prior ---

#: Pixels per token of the prior along a side: two tokens of the transformer. Sides are multiples of it.
PRIOR_PIXELS = 32


def small_grid(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of the small image that precedes an image of ``rows`` x ``columns`` tokens."""
    ratio = rows / columns
    return int(math.sqrt(ratio) * 16), int(math.sqrt(1 / ratio) * 16)


def tokens_to_generate(height: int, width: int, with_images: bool) -> int:
    """The number of tokens that the prior generates for an image, including those of the small image."""
    rows, columns = height // PRIOR_PIXELS, width // PRIOR_PIXELS
    return rows * columns + (0 if with_images else math.prod(small_grid(rows, columns)))
