"""The noise that stochastic steps add."""

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

    A list of generators gives each sample its own, so its noise does not depend on the batch it is in.
    """
    if isinstance(generator, Sequence):
        if len(generator) not in (1, shape[0]):
            raise InputError(
                f"{len(generator)} generators were given for {shape[0]} samples; give one for the batch, or a list "
                f"with one for each sample"
            )
        part = [shape[0] // len(generator), *shape[1:]]
        return torch.cat([draw_noise(part, each, device, dtype) for each in generator])
    source = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)
