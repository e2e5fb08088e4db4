"""Standard normal noise: of initial latents, of encoded pictures, and of the steps that add some."""

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
    """Standard normal noise, drawn where the generator lives: a CPU one gives the same on any device.

    Args:
        shape: [B, ...].
        generator: one for a single draw over the batch; or a list with one for each picture, whose noise then
            does not depend on the batch it is in. None uses torch's own.

    Raises:
        InputError: a list of generators that is not as long as the batch.
    """
    if isinstance(generator, Sequence):
        if len(generator) == 1:
            return draw_noise(shape, generator[0], device, dtype)
        if len(generator) != shape[0]:
            raise InputError(
                f"{len(generator)} generators were given for {shape[0]} pictures; give one for the batch, or a list "
                f"with one for each picture"
            )
        return torch.cat([draw_noise([1, *shape[1:]], each, device, dtype) for each in generator])
    source = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)
