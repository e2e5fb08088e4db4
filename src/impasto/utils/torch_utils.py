"""Random tensors, and what torch.compile has wrapped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..errors import InputError
from ..nn.changes import unwrapped
from ..nn.machine import as_device
from ..nn.noise import draw_noise


def randn_tensor(
    shape: Sequence[int],
    generator: Generator | list[Generator] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
) -> Tensor:
    """Standard normal noise; a CPU generator gives the same on every device.

    Args:
        generator: one for all, or a list with one for each row.
        layout: only ``torch.strided``.
    """
    if layout not in (None, torch.strided):
        raise InputError(f"noise is strided, not of layout {layout}; leave layout out")
    target = torch.device("cpu") if device is None else as_device(device)
    if isinstance(generator, Generator) and generator.device.type not in ("cpu", target.type):
        raise InputError(f"a generator on {generator.device} makes no noise for {target}; use one on the CPU")
    return draw_noise(shape, generator, target, torch.get_default_dtype() if dtype is None else dtype)


def is_compiled_module(module: Any) -> bool:
    """Whether torch.compile has wrapped a module as a whole."""
    return isinstance(module, nn.Module) and unwrapped(module) is not module
