"""Several linear layers of one input as one product."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError
from .changes import Change, is_plain, is_plain_tensor, refuse_conflicts


class FusedLinear(Change):
    """Several linear layers of one input as one product. Belongs in an attribute of the module that has the layers.

    The layers' parameters become views of its matrix, so it takes no memory, and what is loaded into them in place is
    seen here too. Check ``holds`` before each use, and call the layers themselves if it returns False.

    Raises:
        ConfigurationError: one of the layers is not an ``nn.Linear``, for example an adapter or quantized.
    """

    change = "fused"
    undo = "call unfuse_qkv_projections() on the model"
    conflicts: ClassVar = ("quantized",)

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers: list[nn.Linear] = []
        for layer in layers:
            refuse_conflicts(layer, FusedLinear)
            if type(layer) is not nn.Linear or not all(map(is_plain_tensor, layer.parameters())):
                raise ConfigurationError(
                    f"cannot fuse a {type(layer).__name__}: a linear projection has an adapter, or a weight that "
                    f"another library has quantized or sharded. Merge or remove it first."
                )
            self.layers.append(layer)
        sizes = [layer.out_features for layer in self.layers]
        self._views: list[tuple[nn.Linear, str, Tensor, Tensor]] = []  # each parameter, and its slice of the fused one
        with torch.no_grad():
            self.weight = torch.cat([layer.weight for layer in self.layers])
            self.bias = None if self.layers[0].bias is None else torch.cat([layer.bias for layer in self.layers])
            for name, fused in (("weight", self.weight), ("bias", self.bias)):
                for layer, view in zip(self.layers, () if fused is None else fused.split(sizes)):
                    parameter = getattr(layer, name)
                    parameter.data = view
                    self._views.append((layer, name, parameter, view))

    def holds(self, *layers: nn.Module) -> bool:
        """Whether the product can replace calls of these layers: without gradients, and if nothing was replaced."""
        if torch.is_grad_enabled() or len(layers) != len(self.layers):
            return False
        if any(mine is not theirs for mine, theirs in zip(self.layers, layers)):
            return False
        if not all(is_plain(layer, nn.Linear) for layer in self.layers):
            return False
        if any(getattr(layer, name) is not parameter for layer, name, parameter, _ in self._views):
            return False
        # Compiled graphs have no addresses: what assigns to ``.data`` must do so before compilation.
        return torch.compiler.is_compiling() or all(p.data_ptr() == view.data_ptr() for _, _, p, view in self._views)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedLinear:
        return FusedLinear(copy.deepcopy(self.layers, memo))  # copies of parameters are no views


def project(fused: FusedLinear | None, layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """``layer(x)`` for each of the layers, in one product if it may stand for them."""
    if fused is not None and fused.holds(*layers):
        return fused(x).chunk(len(layers), dim=-1)
    return [layer(x) for layer in layers]
