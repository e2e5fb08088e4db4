"""Muon: momentum with orthogonalized matrices (K. Jordan, 2024), on any processor.

``torch.optim.Muon`` iterates in bfloat16; without native bfloat16 products, a step takes minutes. This one computes the
same in the fastest dtype of the machine. Their states are interchangeable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...nn.machine import fast_dtype
from ..distributed.shards import each_by_one, local

#: Of the odd quintic a x + b x³ + c x⁵, whose iteration brings singular values close to 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
_TOGETHER = 2**24  # elements of the matrices that iterate together, which takes several times their memory


class Muon(torch.optim.Optimizer):
    """For matrices that map hidden states to hidden states.

    Updates are scaled to the size of AdamW's (2502.16982, eq. 4), so that both use the same learning rate.

    Args:
        params: tensors [out, in] or the kernels of convolutions [out, in, ...], or groups of them.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            averages = [self._average(p, group["momentum"]) for p in parameters]
            # Each process orthogonalizes a share of sharded matrices.
            updates = each_by_one(averages, orthogonalized)
            for parameter, update in zip(parameters, updates, strict=True):
                size = 0.2 * max(len(parameter), parameter.numel() // len(parameter)) ** 0.5
                local(parameter).mul_(1 - group["lr"] * group["weight_decay"])
                local(parameter).add_(update, alpha=-group["lr"] * size)

    def _average(self, parameter: Tensor, momentum: float) -> Tensor:
        """Nesterov's momentum."""
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        local(state["momentum_buffer"]).lerp_(local(gradient), 1 - momentum)
        return gradient.lerp(state["momentum_buffer"], momentum)


def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Approximately U Vᵀ of the singular value decomposition U S Vᵀ of each matrix, by Newton-Schulz iterations.

    Matrices of one shape iterate together, as a GPU launches products of small ones more slowly than it computes them.

    Args:
        matrices: [out, in]; a kernel [out, in, ...] counts as [out, all].
    """
    flat = [matrix.flatten(1) for matrix in matrices]
    wide = [x.T if x.shape[0] > x.shape[1] else x for x in flat]  # the smaller Gram matrix
    by_shape: dict[torch.Size, list[int]] = {}
    for number, x in enumerate(wide):
        by_shape.setdefault(x.shape, []).append(number)
    found: dict[int, Tensor] = {}
    for shape, numbers in by_shape.items():
        size = max(1, _TOGETHER // shape.numel())
        for some in (numbers[i : i + size] for i in range(0, len(numbers), size)):
            x = torch.stack([wide[number] for number in some]).to(fast_dtype(wide[some[0]].device))
            found |= zip(some, _iterated(x))
    return [
        (found[number].T if wide[number] is not x else found[number]).to(matrix.dtype).view_as(matrix)
        for number, (matrix, x) in enumerate(zip(matrices, flat))
    ]


def _iterated(x: Tensor) -> Tensor:
    """Of matrices [K, out, in], at most as high as wide."""
    a, b, c = COEFFICIENTS
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of at most 1
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
