"""The one seam between every attention of the project and the kernels that compute it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import processor_has

#: Above so many scores the products would not stay in cache, and they would take too much memory.
_MAX_SCORES_IN_TRAINING = 2**25
#: Scores of one tile in inference: 4 MB in bfloat16, which two cores hold in their caches (benchmarks/attention.py).
_TILE_SCORES = 2**21

_LEAST_ROWS = 256
#: Among so many keys the largest score of a query is looked for.
_SAMPLED_KEYS = 128


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
    if _trains_on_cpu(query, key):
        return _products(query, key, value, bias, scale)
    if bias is None and _tiles_are_faster(query, key):
        return _tiled_products(query, key, value, scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def _trains_on_cpu(query: Tensor, key: Tensor) -> bool:
    """torch's backward of CPU attention takes several times as long as the plain products' (2.13, AMX machine)."""
    if query.device.type != "cpu" or not torch.is_grad_enabled():
        return False
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return scores <= _MAX_SCORES_IN_TRAINING and (query.requires_grad or key.requires_grad)


def _products(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if bias is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    finite = bias.clamp(min=torch.finfo(bias.dtype).min / 2)
    out = torch.softmax(scores + finite, dim=-1, dtype=torch.float32).to(value.dtype) @ value
    return out.masked_fill(bias.amax(dim=-1, keepdim=True) == -torch.inf, 0.0)


def _tiles_are_faster(query: Tensor, key: Tensor) -> bool:
    """torch's CPU attention multiplies 16-bit matrices at a fraction of oneDNN's rate, except where there is AMX."""
    if query.dtype != key.dtype or torch.is_autocast_enabled("cpu"):
        return False
    if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return False
    return not torch.compiler.is_compiling() and not processor_has("amx_tile")


def _tiled_products(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Some heads, or some queries of one head, at a time, so that their scores stay in cache between the products.

    Rounded scores are off by a share of their size, and it is the largest ones that count. So about the largest of
    each query, found among some of the keys, is taken off inside the product, in float32: an additional channel of
    query and key. Softmax does not mind what is taken off, nor does it need the exact maximum here.
    """
    batch, heads, length, size = query.shape
    scale = size**-0.5 if scale is None else scale
    some = key[:, :, :: max(1, key.shape[2] // _SAMPLED_KEYS)]
    peak = (query @ some.transpose(2, 3)).amax(-1, keepdim=True)  # [B, heads, N, 1]
    peak = peak.clamp(-_largest(query), _largest(query))  # a product of float16 may overflow
    one = key.new_ones(1, 1, 1, 1).expand(*key.shape[:3], 1)
    queries = torch.cat([query, -peak], -1).flatten(0, 1)  # [B * heads, N, head_dim + 1]
    keys = torch.cat([key, one], -1).flatten(0, 1).transpose(1, 2)  # [B * heads, head_dim + 1, M]
    values = value.flatten(0, 1)  # [B * heads, M, head_dim]
    out = query.new_empty(batch, length, heads, values.shape[2])  # where the next projection wants it

    # Of scores; for each tile all keys and values are read, which must pay even where they are many.
    rows = max(min(_LEAST_ROWS, length), _TILE_SCORES // keys.shape[2])
    at_once = max(1, rows // length)  # heads
    for first in range(0, batch * heads, at_once):
        group = slice(first, first + at_once)
        for start in range(0, length, rows):
            tile = slice(start, start + rows)
            part = queries[group, tile]  # [g, n, head_dim + 1]
            scores = part.new_empty(*part.shape[:2], keys.shape[2])  # [g, n, M]
            torch.baddbmm(scores, part, keys[group], beta=0, alpha=scale, out=scores)
            found = torch.softmax(scores, dim=-1, out=scores) @ values[group]  # [g, n, head_dim]
            for i, result in enumerate(found, first):
                out[i // heads, tile, i % heads] = result
    return out.transpose(1, 2)  # [B, heads, N, head_dim]


def _largest(x: Tensor) -> float:
    return torch.finfo(x.dtype).max / 2


def attention_formula(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The same in plain float64: what every backend is compared with."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.double() @ key.double().transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias.double()
    return torch.nan_to_num(torch.softmax(scores, dim=-1)) @ value.double()
