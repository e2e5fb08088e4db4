"""Linear layers as oneDNN's own products on the CPU: gelu in the epilogue, and packed weights.

A packed weight is stored in the order in which it is multiplied; otherwise each product reorders it tile by tile. The
results are bit-identical. Only bfloat16 is packed: float32 gains 3 to 6 %, for twice the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..changes import is_plain
from ..machine import has_epilogues, has_onednn_products
from ..tokens import is_tracing

#: From so many rows on, packing a weight for one call of a model takes less time than it saves.
PACKING_PAYS = 4096


#: A linear layer, optionally followed by gelu: [..., in_features] -> [..., out_features].
Product = Callable[[Tensor], Tensor]


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), by oneDNN if that is faster.

    Args:
        layer: any; oneDNN multiplies only plain linear ones, also if idle dropout follows, and the others are called.
        x: [..., in_features].
    """
    if not _computes(x):
        called: Tensor = layer(x)
        return called
    alone = layer
    if is_plain(layer, nn.Sequential):
        awake = [inner for inner in layer.children() if not is_plain(inner, nn.Dropout)]
        alone = awake[0] if len(awake) == 1 else layer
    out: Tensor = _product(alone, None, x) if multiplies(alone, x) else layer(x)
    return out


def linear_gelu(layer: nn.Module, x: Tensor, approximate: str) -> Tensor:
    """gelu(layer(x)), with the activation applied while the product is still in registers if that is faster.

    This saves writing and reading the widest hidden state of a transformer, and one rounding.

    Args:
        layer: as for ``linear``, without dropout.
        x: [..., in_features].
        approximate: ``none`` or ``tanh``, as for torch's gelu.
    """
    if not multiplies(layer, x):
        return F.gelu(layer(x), approximate=approximate)
    return _product(layer, approximate, x)


def product(layer: nn.Module, rows: int, approximate: str | None = None) -> Product:
    """The layer, and gelu unless ``approximate`` is None, for an input of so many rows that is split into slices.

    With many rows, the weight is packed here, so the product is valid for one call of a model: the weight may change.

    Args:
        layer: one that ``multiplies``.
        rows: of all slices.
    """
    assert isinstance(layer, nn.Linear)
    packs = rows >= PACKING_PAYS and layer.weight.dtype == torch.bfloat16
    return partial(_product, layer, approximate, weight=_pack(layer.weight, rows) if packs else None)


def joined_product(layers: Sequence[nn.Module], rows: int | None) -> Product:
    """The concatenated outputs of layers of one input, for very many calls.

    Args:
        rows: of the input, few. The weights are packed if possible, and then read twice as fast; such a product is
            valid as long as they do not change. None: not packed.
    """
    weights = [layer.weight for layer in layers if isinstance(layer.weight, Tensor)]
    packs = all(weight.dtype == torch.bfloat16 for weight in weights) and all(map(multiplies, layers, weights))
    if rows is None or not packs:
        return layers[0] if len(layers) == 1 else lambda x: torch.cat([layer(x) for layer in layers], dim=-1)
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    joined = nn.Linear(linears[0].in_features, sum(layer.out_features for layer in linears), bias=False, device="meta")
    bias = None if linears[0].bias is None else torch.cat([layer.bias for layer in linears])
    weight = linears[0].weight if len(linears) == 1 else torch.cat([layer.weight for layer in linears])
    joined.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return partial(_product, joined, None, weight=_pack(weight, rows))


def _product(layer: nn.Module, approximate: str | None, x: Tensor, weight: Tensor | None = None) -> Tensor:
    assert isinstance(layer, nn.Linear)
    weight = layer.weight if weight is None else weight
    fused = approximate is not None and has_epilogues(x.dtype)
    activation: tuple[str, list[float], str | None] = ("gelu", [], approximate) if fused else ("none", [], "")
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, layer.bias, *activation)
    if approximate is not None and not fused:
        torch.ops.aten.gelu_(out, approximate=approximate)
    return out


def _pack(weight: Tensor, rows: int) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return packed


def multiplies(layer: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN's product can replace a call of a layer: a plain one on the CPU, without gradients."""
    if not _computes(x) or not is_plain(layer, nn.Linear):
        return False
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.dtype != x.dtype or weight.device != x.device or torch.is_autocast_enabled("cpu"):
        return False
    if is_tracing():
        return False
    return has_onednn_products(x.dtype)


def _computes(x: Tensor) -> bool:
    """Whether any layer's product could be replaced. Asked first, as looking at each layer makes a GPU wait."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()
