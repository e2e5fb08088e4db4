"""Attention of sequences of several lengths in one call: FlashAttention on CUDA, in 16 bits, without a bias."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tokens import Layout


def runs_varlen(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these tensors [T, heads, head_dim], on a GPU of compute capability 8.0 or more."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    alike = query.dtype == key.dtype == value.dtype and query.shape[-1] <= 256 and query.shape[-1] % 8 == 0
    return alike and torch.cuda.get_device_capability(query.device) >= (8, 0)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Each image's attention to its own tokens, [T, heads, head_dim] for all three and the result."""
    from torch.nn.attention.varlen import varlen_attn

    # Without splits an image's result is the same whatever else is in the batch.
    ends = (layout.offsets, layout.offsets, layout.longest, layout.longest)
    out = varlen_attn(query, key, value, *ends, num_splits=1)
    assert isinstance(out, Tensor)
    return out
