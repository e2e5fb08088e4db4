"""Attention of sequences of several lengths in one call: FlashAttention on CUDA, in 16 bits, without a bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tokens import Layout

#: So an image's result is the same whatever else is in the batch. Before torch 2.13 there was no such choice.
_WITHOUT_SPLITS: dict[str, Any] = {"num_splits": 1} if torch.__version__ >= "2.13" else {}


def runs_varlen(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these tensors [T, heads, head_dim], on a GPU of compute capability 8.0 or more."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    alike = query.dtype == key.dtype == value.dtype and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    return alike and torch.cuda.get_device_capability(query.device) >= (8, 0)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Each image's attention to its own tokens, [T, heads, head_dim] for all three and the result."""
    from torch.nn.attention.varlen import varlen_attn

    ends = (layout.offsets, layout.offsets, layout.longest, layout.longest)
    out = varlen_attn(query, key, value, *ends, **_WITHOUT_SPLITS)
    assert isinstance(out, Tensor)
    return out
