"""Linear layers as oneDNN's own products on the CPU: gelu in the epilogue, and packed weights.

A weight is packed when it lies in the order in which it is multiplied. Otherwise each product brings it into that order
for itself, tile by tile and less well. The results are the same to the bit. Only bfloat16 is packed: float32 gains 3 to
6 %, for twice the memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..machine import has_epilogues, has_onednn_products
from ..plain import is_plain_linear

#: From so many rows on, packing a weight for one call of a model takes less time than its products then save.
PACKING_PAYS = 4096


class Product(Protocol):
    """A linear layer, and maybe gelu after it: [..., in_features] -> [..., out_features]."""

    def __call__(self, x: Tensor) -> Tensor: ...


class _Packed(NamedTuple):
    weight: Tensor
    made_of: weakref.ref[Tensor]
    state: tuple[object, ...]  # of what it was made of: where it lies, its version, ...
    numbers: tuple[Tensor, ...]


class KeptWeight:
    """A layer's weight packed, as long as it is the layer's weight: made when it is first needed, and again."""

    def __init__(self) -> None:
        self._packed: _Packed | None = None

    def of(self, layer: nn.Linear, rows: int) -> Tensor:
        """The packed weight for products of about so many rows.

        A weight that was replaced, moved, loaded or trained is packed anew. What writes through ``weight.data`` (or
        into an inference tensor) leaves no trace but in the numbers: ``check`` reads them.
        """
        packed, weight = self._packed, layer.weight  # another thread may forget it in the meantime
        if packed is None or not _is_made_of(packed, weight):
            packed = _Packed(_pack(weight, rows), weakref.ref(weight), _state(weight), _numbers(weight))
            self._packed = packed
        return packed.weight

    def check(self, layer: nn.Linear) -> None:
        """Forget the packed weight unless it is that of the layer, to the numbers."""
        packed, weight = self._packed, layer.weight
        if packed is None:
            return
        if not _is_made_of(packed, weight) or not all(map(torch.equal, packed.numbers, _numbers(weight))):
            self._packed = None


#: By their layer: a copy of the layer is a plain one, and where the layer ends, so does what is kept for it.
KEPT: weakref.WeakKeyDictionary[nn.Module, KeptWeight] = weakref.WeakKeyDictionary()


def check_kept_weights(model: nn.Module) -> None:
    """Forget those of a model's packed weights that are not its weights any more; reads all of them once."""
    if len(KEPT) == 0:
        return
    for layer in model.modules():
        kept = KEPT.get(layer)
        if kept is not None:
            assert isinstance(layer, nn.Linear)
            kept.check(layer)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), by oneDNN if that is faster, and with the packed weight if one is kept.

    Args:
        layer: any; only plain linear ones that nobody watches are taken apart.
        x: [..., in_features].
    """
    out: Tensor = _product(layer, None, x) if multiplies(layer, x) else layer(x)
    return out


def linear_gelu(layer: nn.Module, x: Tensor, approximate: str) -> Tensor:
    """gelu(layer(x)), the activation applied while the product's result is still in registers if that is faster.

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

    With many rows, its weight is packed for them here. So it is for one call of a model: the weight may change.

    Args:
        layer: one that ``multiplies``.
        rows: of all parts.
    """
    assert isinstance(layer, nn.Linear)
    once = rows >= PACKING_PAYS and layer not in KEPT and layer.weight.dtype == torch.bfloat16
    return partial(_product, layer, approximate, weight=_pack(layer.weight, rows) if once else None)


def joined_product(layers: Sequence[nn.Module], rows: int | None) -> Product:
    """Layers of one input, one after the other, that are called very often.

    Args:
        rows: of the input. For so few the weights are packed if that can be, and then read twice as fast; such a
            product is to be kept only as long as nobody changes them. None: not packed.
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
    if weight is None:
        kept = KEPT.get(layer) if x.dtype == torch.bfloat16 else None
        weight = layer.weight if kept is None else kept.of(layer, x.numel() // x.shape[-1])
    fused = approximate is not None and has_epilogues(x.dtype)
    activation: tuple[str, list[float], str | None] = ("gelu", [], approximate) if fused else ("none", [], "")
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, layer.bias, *activation)
    if approximate is not None and not fused:
        torch.ops.aten.gelu_(out, approximate=approximate)
    return out


def _pack(weight: Tensor, rows: int) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return packed


def _is_made_of(packed: _Packed, weight: Tensor) -> bool:
    return packed.made_of() is weight and packed.state == _state(weight)


def _state(weight: Tensor) -> tuple[object, ...]:
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), weight.device, weight.dtype, weight.stride(), version


def _numbers(weight: Tensor) -> tuple[Tensor, ...]:
    """Sums of a weight's bits by row and by column, eight bytes at a time where they lie so."""
    bits = weight.detach().contiguous()
    whole = bits.shape[-1] % 4 == 0 and bits.data_ptr() % 8 == 0 and bits.storage_offset() % 4 == 0
    bits = bits.view(torch.int64 if whole else torch.int16)
    return bits.sum(dim=0, dtype=torch.int64), bits.sum(dim=1, dtype=torch.int64)


def multiplies(layer: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN's product may stand for a layer: on the CPU, of a plain one, and where no gradient is wanted."""
    if not is_plain_linear(layer) or x.device.type != "cpu":
        return False
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if weight.dtype != x.dtype or weight.device != x.device:
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    return has_onednn_products(x.dtype)
