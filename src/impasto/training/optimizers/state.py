"""The state of optimizers as named tensors, plain or sharded, for checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def state_tensors(optimizers: Sequence[torch.optim.Optimizer], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What optimizers remember of parameters, as "optimizers.0.NAME.exp_avg": the tensors themselves, not copies.

    Args:
        named: the parameters of the optimizers by name.
    """
    names = {id(parameter): name for name, parameter in named.items()}
    return {
        f"optimizers.{i}.{names[id(parameter)]}.{key}": value
        for i, optimizer in enumerate(optimizers)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def start_state(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Make the state that a first step would make, to read a stored one into. The parameters do not change."""
    for optimizer in optimizers:
        rates = [set_rate(group, 0.0) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            set_rate(group, rate)


def set_rate(group: dict[str, Any], rate: float) -> float:
    """Set the learning rate of a group, in place where an optimizer has it as a tensor, and return the former one."""
    former = float(group["lr"])
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
    return former


#: What the settings decide.
_OF_SETTINGS = {"lr", "peak", "weight_decay", "betas", "eps", "params"}


def group_numbers(optimizers: Sequence[torch.optim.Optimizer]) -> list[list[dict[str, float]]]:
    """What optimizers remember in their groups, such as Prodigy its estimate of the distance."""
    return [
        [
            {
                name: float(value) if isinstance(value, Tensor) else value
                for name, value in group.items()
                if _kept(name, value)
            }
            for group in optimizer.param_groups
        ]
        for optimizer in optimizers
    ]


def _kept(name: str, value: Any) -> bool:
    number = type(value) in (int, float) or (isinstance(value, Tensor) and value.numel() == 1)
    return name not in _OF_SETTINGS and number and math.isfinite(value)


def restore_group_numbers(optimizers: Sequence[torch.optim.Optimizer], stored: Any) -> None:
    """Put the numbers back.

    Raises:
        ValueError, TypeError: they are of other optimizers.
    """
    for optimizer, groups in zip(optimizers, stored, strict=True):
        for group, numbers in zip(optimizer.param_groups, groups, strict=True):
            for name, value in numbers.items():
                former = group.get(name)
                if isinstance(former, Tensor):
                    former.fill_(value)
                elif former is not None:
                    group[name] = type(former)(value)
