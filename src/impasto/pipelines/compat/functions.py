"""Functions that diffusers has next to its pipelines, and that scripts import from there."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError


def retrieve_timesteps(
    scheduler: Any,
    num_inference_steps: int | None = None,
    device: torch.device | str | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    **options: Any,
) -> tuple[Tensor, int]:
    """Set a scheduler's timesteps, and return them and the number of steps.

    Args:
        timesteps, sigmas: a custom schedule, in place of a number of steps.
        options: further arguments of ``set_timesteps``.

    Raises:
        InputError: the scheduler takes no such schedule.
    """
    custom = {name: x for name, x in (("timesteps", timesteps), ("sigmas", sigmas)) if x is not None}
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    for name in custom:
        if name not in accepted:
            raise InputError(f"{type(scheduler).__name__} takes no {name}; use a scheduler that takes them")
    if not custom:
        options["num_inference_steps"] = num_inference_steps
    scheduler.set_timesteps(device=device, **custom, **options)
    steps: Tensor = scheduler.timesteps
    return steps, len(steps) if custom or num_inference_steps is None else num_inference_steps
