"""An exponential moving average of parameters, which samples better than the last ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class EMA:
    """Shadow copies of named tensors: shadow <- decay * shadow + (1 - decay) * parameter.

    Early on, where the average would still hold mostly the initial values, the decay is (1 + n) / (10 + n) after n
    updates.
    """

    def __init__(self, named: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.updates = 0
        self.live = dict(named)
        self.shadow = {name: tensor.detach().clone() for name, tensor in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.shadow.values()), list(self.live.values()), 1 - decay)

    def state_dict(self) -> dict[str, Tensor | int]:
        return {"updates": self.updates, **self.shadow}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        for name, value in state.items():
            if isinstance(value, Tensor):
                self.shadow[name].copy_(value)
            else:
                self.updates = value
