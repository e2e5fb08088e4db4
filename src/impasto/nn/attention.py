"""The one seam between every attention of the project and the kernels that compute it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(query keyᵀ · scale + bias) value (Vaswani et al. 2017, eq. 1).

    Args:
        query: [B, heads, N, head_dim].
        key, value: [B, heads, M, head_dim].
        bias: added to the scores, broadcastable to [B, heads, N, M]. A row of -inf only gives zeros, not NaN.
        scale: head_dim ** -0.5 unless given.

    Returns:
        [B, heads, N, head_dim] in the dtype of ``query``.
    """
    if bias is not None:
        bias = bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def attention_formula(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The same in plain float64: what every backend is compared with."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.double() @ key.double().transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias.double()
    return torch.nan_to_num(torch.softmax(scores, dim=-1)) @ value.double()
