"""Whether the models of a run fit each other and the sizes of its images, else it would fail late or learn nothing."""

from __future__ import annotations

import math
from typing import Any

from ...errors import ConfigurationError
from ...family import PRIOR_PIXELS, pixels_per_latent
from ..data.buckets import Buckets
from ..settings.configuration import Configuration


def check_fit(configuration: Configuration, transformer: Any, vae: Any, is_glm_image: bool = False) -> None:
    """Check latent channels, and that the sides of all buckets are whole numbers of tokens.

    Args:
        transformer: None if it is not known.

    Raises:
        ConfigurationError: they do not fit; the message names the key.
    """
    unit = pixels_per_latent(vae.config)
    if transformer is not None:
        unit *= transformer.config["patch_size"]
        takes, makes = transformer.config["in_channels"], vae.config["latent_channels"]
        if takes != makes:
            raise ConfigurationError(
                f"models.vae: its latents have {makes} channels (latent_channels), and the transformer takes {takes} "
                f"(in_channels); name models that belong together, or set models.transformer.config.in_channels "
                f"to {makes}"
            )
    if is_glm_image:
        unit = math.lcm(unit, PRIOR_PIXELS)
    base = configuration.data.base
    for size in configuration.data.sizes or Buckets.of_base(base or 0).sizes:
        nearest = [unit * max(1, round(side / unit)) for side in size]
        if nearest != list(size):
            key, hint = ("sizes", f"the nearest size is {nearest}") if base is None else ("base", "give data.sizes")
            raise ConfigurationError(
                f"data.{key}: the sides of {list(size)} must be multiples of {unit} px for these models; {hint}"
            )
