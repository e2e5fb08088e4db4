"""Standard normal noise for initial latents, encoded images and stochastic steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator

from ..errors import InputError


def draw_noise(
    shape: Sequence[int],
    generator: Generator | Sequence[Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Standard normal noise, drawn on the generator's device: a CPU generator gives the same noise on any device.

    Args:
        shape: [B, ...].
        generator: one for a single draw over the batch; or a list with one per image, whose noise then does not depend
            on its batch. None uses torch's global generator.

    Raises:
        InputError: the number of generators is not the batch size.
    """
    if isinstance(generator, Sequence):
        if len(generator) == 1:
            return draw_noise(shape, generator[0], device, dtype)
        if len(generator) != shape[0]:
            raise InputError(
                f"{len(generator)} generators were given for {shape[0]} images; give one for the batch, or a list "
                f"with one per image"
            )
        return torch.cat([draw_noise([1, *shape[1:]], each, device, dtype) for each in generator])
    source = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)
