"""Which layers may be taken apart."""

from __future__ import annotations

from torch import nn


def is_watched(module: nn.Module) -> bool:
    """Whether someone has to be told of a module's calls, or has taken them over: hooks, a seam, another forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or module._compiled_call_impl is not None or "forward" in vars(module)


def is_idle_dropout(module: nn.Module) -> bool:
    """Whether a module is dropout that drops nothing, and nobody would miss its call."""
    return type(module) is nn.Dropout and not is_watched(module) and (not module.training or module.p == 0)


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer is its weight and bias alone: no adapter, no quantised weight, and not watched."""
    if type(layer) is not nn.Linear or is_watched(layer):
        return False
    return type(layer.weight) is nn.Parameter and (layer.bias is None or type(layer.bias) is nn.Parameter)
