"""Which layers may be taken apart."""

from __future__ import annotations

from torch import nn


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer is its weight and bias alone: no adapter, no hook, no quantised weight, no other forward."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    return type(layer.weight) is nn.Parameter and (layer.bias is None or type(layer.bias) is nn.Parameter)
