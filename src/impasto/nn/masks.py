"""Token masks as biases of attention scores."""

from __future__ import annotations

import torch
from torch import Tensor

#: A bias at or below this discards a key; the documented value is -10000, which bfloat16 rounds to -9984.
DISCARD = -9000.0


def text_bias(mask: Tensor) -> Tensor:
    """A text mask in either format, [B, M] or [B, 1, M] -> a bias [B, 1, 1, M] in which -inf discards."""
    if mask.ndim == 2:
        zeros = torch.zeros(mask.shape, device=mask.device)
        return zeros.masked_fill(~mask.bool(), -torch.inf)[:, None, None]
    bias = mask.float()
    return bias.masked_fill(bias <= DISCARD, -torch.inf)[:, None]
