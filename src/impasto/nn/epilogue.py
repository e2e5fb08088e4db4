"""A linear layer and the activation behind it as one product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import has_bfloat16_epilogues
from .plain import is_plain_linear


def linear_gelu(layer: nn.Module, x: Tensor, approximate: str) -> Tensor:
    """gelu(layer(x)), the activation applied while the product's result is still in registers where that can be.

    That saves writing and reading the widest hidden state of a transformer, and rounds once less.

    Args:
        layer: any; only plain linear ones that nobody watches are taken apart.
        x: [..., in_features].
        approximate: ``none`` or ``tanh``, as torch's gelu has it.
    """
    if _has_epilogue(layer, x):
        assert isinstance(layer, nn.Linear)
        fused: Tensor = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], approximate)
        return fused
    return F.gelu(layer(x), approximate=approximate)


def _has_epilogue(layer: nn.Module, x: Tensor) -> bool:
    """oneDNN's product has one on the CPU; it has no gradient."""
    if not is_plain_linear(layer) or x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return False
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.dtype != x.dtype or weight.device != x.device:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return has_bfloat16_epilogues()
