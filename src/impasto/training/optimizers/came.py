"""CAME (2307.02047): Adafactor's factored second moments, and updates scaled by how far one can trust them.

Its state is a first moment and, for a matrix [n, m], vectors of n and of m numbers instead of a second moment. It works
on plain tensors and on shards of FSDP2, where each process updates its rows and adds up what concerns all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..distributed.shards import is_sharded, local, sum_of_shards, zeros_like_shards


class CAME(torch.optim.Optimizer):
    """Confidence-guided adaptive memory-efficient optimization.

    Args:
        params: float32 tensors. Those of more than two dimensions are stacks of matrices; vectors have a second moment
            of their own and no confidence.
        betas: of the first moment, the second moments and the confidence.
        eps: added to squared gradients and to squared deviations of the updates from their average.
        clip: the largest root mean square of an update, before averaging.
        weight_decay: decoupled, times the learning rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip: float = 1.0,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "clip": clip, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, **{name: value for name, value in group.items() if name in self.defaults})

    def _update(
        self,
        parameters: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float, float],
        eps: tuple[float, float],
        clip: float,
        weight_decay: float,
    ) -> None:
        beta1, beta2, beta3 = betas
        updates = [local(p.grad).clone() for p in parameters if p.grad is not None]
        self._precondition(parameters, updates, [g.square() + eps[0] for g in updates], "exp_avg_sq", beta2)
        squares = _summed([u.square().sum() for u in updates], parameters)
        averages = []
        for parameter, update, square in zip(parameters, updates, squares, strict=True):
            rms = (square / parameter.numel()).sqrt()
            update /= (rms / clip).clamp(min=1.0)
            averages.append(local(self._moment(parameter, "exp_avg", parameter.shape)).lerp_(update, 1 - beta1))

        # The confidence is high where updates stay close to their average (algorithm 2, lines 9 to 11).
        matrices = [i for i, p in enumerate(parameters) if p.ndim >= 2]
        deviations = [(updates[i] - averages[i]).square() + eps[1] for i in matrices]
        final = [average.clone() if p.ndim >= 2 else average for p, average in zip(parameters, averages)]
        self._precondition(
            [parameters[i] for i in matrices], [final[i] for i in matrices], deviations, "exp_avg_res", beta3
        )
        for parameter, update in zip(parameters, final, strict=True):
            local(parameter).mul_(1 - lr * weight_decay).sub_(update, alpha=lr)

    def _precondition(
        self,
        parameters: Sequence[Tensor],
        values: Sequence[Tensor],
        squares: Sequence[Tensor],
        name: str,
        beta: float,
    ) -> None:
        """Divide values by the root of the moving average of squares; that of a matrix is factored (1804.04235)."""
        sums: list[Tensor] = []  # of each matrix over its rows: of the squares and of the average of each row
        owners: list[Tensor] = []
        for parameter, value, square in zip(parameters, values, squares, strict=True):
            if parameter.ndim < 2:
                value /= local(self._moment(parameter, name, parameter.shape)).lerp_(square, 1 - beta).sqrt()
                continue
            row = local(self._moment(parameter, f"{name}_row", parameter.shape[:-1])).lerp_(square.mean(-1), 1 - beta)
            sums += [square.sum(-2), row.sum(-1, keepdim=True)]
            owners += [parameter, parameter]
        found = iter(_summed(sums, owners, where=2))
        for parameter, value in zip(parameters, values, strict=True):
            if parameter.ndim < 2:
                continue
            count, shape = parameter.shape[-2], (*parameter.shape[:-2], parameter.shape[-1])
            row = local(self._moment(parameter, f"{name}_row", parameter.shape[:-1]))  # [..., n]
            column = local(self._moment(parameter, f"{name}_col", shape)).lerp_(
                next(found) / count, 1 - beta
            )  # [..., m]
            mean = next(found) / count  # [..., 1]
            value *= (row / mean).rsqrt()[..., :, None] * column.rsqrt()[..., None, :]

    def _moment(self, parameter: Tensor, name: str, shape: Sequence[int]) -> Tensor:
        """A moving average that starts at zero; sharded like the parameter if it has the same first dimension."""
        state = self.state[parameter]
        if name not in state:
            columns_of_matrix = name.endswith("_col") and parameter.ndim == 2
            state[name] = torch.zeros(shape, device=local(parameter).device)
            if isinstance(parameter, DTensor) and not columns_of_matrix:
                state[name] = zeros_like_shards(parameter, shape)
        moment: Tensor = state[name]
        return moment


def _summed(values: Sequence[Tensor], owners: Sequence[Tensor], where: int | None = None) -> list[Tensor]:
    """Sums over the shards of their owners, in one operation; a plain tensor is its own only shard.

    Args:
        where: the number of dimensions of the owners whose values are divided between processes; None: of all.
    """
    values = list(values)
    divided = [i for i, owner in enumerate(owners) if is_sharded(owner) and where in (None, owner.ndim)]
    if divided:
        packed = sum_of_shards(torch.cat([values[i].flatten() for i in divided]), owners[divided[0]])
        parts = packed.split([values[i].numel() for i in divided])
        for i, part in zip(divided, parts, strict=True):
            values[i] = part.view_as(values[i])
    return values
