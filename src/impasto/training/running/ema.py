"""An exponential moving average of parameters, which samples better than their last values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..distributed.shards import local


class EMA:
    """Shadow copies of named tensors: shadow <- decay * shadow + (1 - decay) * parameter.

    The decay of update n = 1, 2, ... is at most (1 + n) / (10 + n), so that the initial values fade quickly. With a
    decay of 0 the shadows are the tensors themselves.
    """

    def __init__(self, named: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.live = dict(named)
        self.shadow = {name: t.detach().clone() if decay else t.detach() for name, t in self.live.items()}

    @torch.no_grad()
    def update(self, n: int) -> None:
        if self.decay:
            decay = min(self.decay, (1 + n) / (10 + n))
            torch._foreach_lerp_(
                [local(t) for t in self.shadow.values()], [local(t) for t in self.live.values()], 1 - decay
            )
