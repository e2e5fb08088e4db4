"""Linear layers of bfloat16 as oneDNN's own products on the CPU: gelu in the epilogue, and packed weights.

A weight is packed when it lies in the order in which it is multiplied. Otherwise each product brings it into that order
for itself, tile by tile and less well. The results are the same to the bit.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import has_bfloat16_epilogues
from .plain import is_plain_linear

#: From so many rows on, packing a weight for one call of a model takes less time than its products then save.
PACKING_PAYS = 4096


class Product(Protocol):
    """A linear layer, and maybe gelu behind it: [..., in_features] -> [..., out_features]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class KeptWeight:
    """A layer's weight packed, as long as it is the layer's weight: made when it is first needed, and again."""

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._made_of: tuple[object, ...] | None = None
        self._sum = 0

    def of(self, layer: nn.Linear, rows: int) -> Tensor:
        """The packed weight for products of about so many rows.

        A weight that was replaced, moved, loaded or trained is packed anew. What writes through ``weight.data``
        leaves no trace but in the numbers: ``check`` reads them.
        """
        weight = layer.weight
        made_of = (weakref.ref(weight), weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if self._packed is None or made_of != self._made_of:
            self._packed, self._made_of, self._sum = _packed(weight, rows), made_of, _sum(weight)
        return self._packed

    def check(self, layer: nn.Linear) -> None:
        """Forget the packed weight if the layer's is another one, by the sum of its bits."""
        if self._packed is not None and _sum(layer.weight) != self._sum:
            self._packed = None


#: By their layer: a copy of the layer is a plain one, and where the layer ends, so does what is kept for it.
KEPT: weakref.WeakKeyDictionary[nn.Module, KeptWeight] = weakref.WeakKeyDictionary()


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), with the packed weight if one is kept.

    Args:
        layer: any; only plain linear ones that nobody watches are taken apart.
        x: [..., in_features].
    """
    if torch.compiler.is_compiling() or layer not in KEPT or not multiplies(layer, x):
        out: Tensor = layer(x)
        return out
    return _product(layer, None, x)


def linear_gelu(layer: nn.Module, x: Tensor, approximate: str) -> Tensor:
    """gelu(layer(x)), the activation applied while the product's result is still in registers where that can be.

    That saves writing and reading the widest hidden state of a transformer, and rounds once less.

    Args:
        layer: as for ``linear``.
        x: [..., in_features].
        approximate: ``none`` or ``tanh``, as torch's gelu has it.
    """
    if not multiplies(layer, x):
        return F.gelu(layer(x), approximate=approximate)
    return _product(layer, approximate, x)


def product(layer: nn.Module, rows: int, approximate: str | None = None) -> Product:
    """The layer, and gelu unless ``approximate`` is None, for an input of so many rows that comes in parts.

    Of many rows, its weight is packed for them here. So it is for one call of a model: the weight may change.

    Args:
        layer: one that ``multiplies``.
        rows: of all parts.
    """
    assert isinstance(layer, nn.Linear)
    once = rows >= PACKING_PAYS and layer not in KEPT
    return partial(_product, layer, approximate, weight=_packed(layer.weight, rows) if once else None)


def _product(layer: nn.Module, approximate: str | None, x: Tensor, weight: Tensor | None = None) -> Tensor:
    assert isinstance(layer, nn.Linear)
    if weight is None:
        kept = KEPT.get(layer)
        weight = layer.weight if kept is None else kept.of(layer, x.numel() // x.shape[-1])
    activation: tuple[str, list[float], str] = ("none", [], "") if approximate is None else ("gelu", [], approximate)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, *activation)
    return out


def _packed(weight: Tensor, rows: int) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return packed


def _sum(weight: Tensor) -> int:
    """The sum of a weight's bits, eight bytes at a time where they lie so."""
    bits = weight.detach()
    aligned = bits.shape[-1] % 4 == 0 and bits.data_ptr() % 8 == 0 and bits.storage_offset() % 4 == 0
    whole = bits.is_contiguous() and aligned
    return int(bits.view(torch.int64 if whole else torch.int16).sum(dtype=torch.int64))


def multiplies(layer: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN's product may stand for a layer: on the CPU, of a plain one, and where no gradient is wanted."""
    if not is_plain_linear(layer) or x.device.type != "cpu" or x.dtype != torch.bfloat16:
        return False
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.dtype != x.dtype or weight.device != x.device:
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return has_bfloat16_epilogues()
