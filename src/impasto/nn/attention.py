"""The one seam between every attention of the project and the kernels that compute it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.tiles import tiled_attention, tiled_attention_in_graphs
from .machine import processor_has

#: Above so many scores the products would not stay in cache, and they would take too much memory.
_MAX_SCORES_IN_TRAINING = 2**25


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
    if _trains_on_cpu(query, key, value):
        return _products(query, key, value, bias, scale)
    if bias is None and _tiles_are_faster(query, key, value):
        tiled = tiled_attention_in_graphs if torch.compiler.is_compiling() else tiled_attention
        return tiled(query, key, value, scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def _trains_on_cpu(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """torch's backward of CPU attention takes several times as long as the plain products' (2.13, AMX machine)."""
    if query.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return scores <= _MAX_SCORES_IN_TRAINING and any(x.requires_grad for x in (query, key, value))


def _products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if bias is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    finite = bias.clamp(min=torch.finfo(bias.dtype).min / 2)
    out = torch.softmax(scores + finite, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    return out.masked_fill(bias.amax(dim=-1, keepdim=True) == -torch.inf, 0.0)


def _tiles_are_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """torch's CPU attention multiplies 16-bit matrices at a fraction of oneDNN's rate, except where there is AMX."""
    if query.dtype != key.dtype or torch.is_autocast_enabled("cpu"):
        return False
    if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return False
    if 0 in query.shape or 0 in key.shape:
        return False
    return not processor_has("amx_tile")


def attention_formula(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The same in plain float64: what every backend is compared with."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.double() @ key.double().transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias.double()
    return torch.nan_to_num(torch.softmax(scores, dim=-1)) @ value.double()
