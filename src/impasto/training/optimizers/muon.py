"""Muon: momentum with orthogonalized matrices (K. Jordan, 2024), on any processor.

``torch.optim.Muon`` iterates in bfloat16; without native bfloat16 products, a step takes minutes. This one computes the
same in the fastest dtype of the machine. Their states are interchangeable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...nn.machine import fast_dtype
from ..distributed.shards import each_by_one, local

#: Of the odd quintic a x + b x³ + c x⁵, whose iteration brings singular values close to 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


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


def orthogonalized(matrix: Tensor) -> Tensor:
    """Approximately U Vᵀ of the singular value decomposition U S Vᵀ, by Newton-Schulz iterations.

    Args:
        matrix: [out, in]; a kernel [out, in, ...] counts as [out, all].
    """
    a, b, c = COEFFICIENTS
    x = matrix.flatten(1).to(fast_dtype(matrix.device))
    x = x / x.norm().clamp(min=1e-7)  # singular values of at most 1
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x  # the smaller Gram matrix
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype).view_as(matrix)
